"""Train in one or more processes, copying the model and sharing it; run by test_sharding.py.

Usage: torchrun ... two_processes.py FOLDER.
"""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import PartialState
from torch.distributed.tensor import DTensor
from transformers.utils import logging

from bkcore.errors import CheckpointError, InputError
from bkcore.model import LanguageModel, ResNetBKForCausalLM
from bkcore.processes import leave
from bkcore.text import TokenWindows
from bkcore.training import Schedule, save_whole, shard, train

TOKENS = torch.randint(0, 50, (30 * 16,), generator=torch.Generator().manual_seed(0))
WINDOWS = TokenWindows(TOKENS, 16)


def schedule(**options: Any) -> Schedule:
    return Schedule(steps=4, batch_size=8, learning_rate=1e-2, max_minutes=60, **options)


def build(seed: int = 0) -> ResNetBKForCausalLM:
    """Float64, so that a difference in what is computed stands out from rounding.

    Without load balancing, which is not linear in the batch.
    """
    logging.disable_progress_bar()
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {
        "d_model": 16,
        "n_layers": 2,
        "n_seq": 16,
        "num_experts": 4,
        "expert_size": 16,
    }
    return LanguageModel(vocab_size=50, **sizes, load_balancing=0.0).double()


def evaluation(model: torch.nn.Module) -> dict[str, float]:
    ids = TOKENS[:128].view(8, 16)
    with torch.no_grad():
        return {"loss": float(model.eval()(ids, labels=ids).loss)}


def copied(output: Path, parts: int) -> ResNetBKForCausalLM:
    model = build()
    train(
        model, WINDOWS, schedule(gradient_accumulation=parts), output=output, evaluation=evaluation
    )
    return model


def shared(output: Path, parts: int) -> None:
    model = build()
    shard(model)
    for parameter in model.parameters():
        assert isinstance(parameter, DTensor)
    shares = [p.to_local() for p in model.parameters() if isinstance(p, DTensor)]
    local = sum(share.numel() for share in shares)
    assert local < 0.6 * sum(parameter.numel() for parameter in model.parameters())
    with pytest.raises(InputError, match="resume checkpoints of a sharded model"):
        train(model, WINDOWS, schedule(), output=output)
    with pytest.raises(InputError, match="a sharded teacher is not supported"):
        train(build(), WINDOWS, schedule(), teacher=model)
    with pytest.raises(InputError, match="Muon needs whole matrices"):
        train(model, WINDOWS, Schedule(4, 8, 1e-2, optimizer="muon"))
    train(model, WINDOWS, schedule(gradient_accumulation=parts))
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    save_whole(model, output)
    with pytest.raises(CheckpointError):  # in all processes: none may wait for one that failed
        save_whole(model, output / "config.json")


def taught(parts: int) -> ResNetBKForCausalLM:
    model = build()
    train(model, WINDOWS, schedule(gradient_accumulation=parts), teacher=build(seed=1))
    return model


def main(folder: Path) -> None:
    state = PartialState(cpu=True)
    for parts in (1, 2):
        model = copied(folder / f"resume-{parts}", parts)
        if state.is_main_process:
            model.save_pretrained(folder / f"copied-{parts}")
        model = taught(parts)
        if state.is_main_process:
            model.save_pretrained(folder / f"taught-{parts}")
        if state.num_processes > 1:
            shared(folder / f"shared-{parts}", parts)
    state.wait_for_everyone()  # one that leaves early tears the connection down for the other
    leave(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
