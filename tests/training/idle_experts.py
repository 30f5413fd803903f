"""Train with experts that serve no token, in two processes; run by test_sharding.py.

Usage: torchrun ... idle_experts.py. Every way of sharing the work reaches the weights that one
process reaches with the whole batch.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers.utils import logging

from bkcore.model import LanguageModel, ResNetBKForCausalLM
from bkcore.model.moe import counting_load
from bkcore.processes import leave
from bkcore.training import shard

TEXTS = torch.randint(0, 50, (3, 4, 5), generator=torch.Generator().manual_seed(0))
"""Batches of four short texts."""


def build(mode: str | None) -> ResNetBKForCausalLM:
    """Float64, and without load balancing, which is not linear in the batch."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"d_model": 16, "n_layers": 2, "num_experts": 8, "experts_per_token": 1}
    model = LanguageModel(vocab_size=50, expert_size=8, load_balancing=0.0, **sizes)
    if mode is not None:
        model.configure_quantization(mode)
        model.calibrate_quantization(list(TEXTS))
    return model.double().train()


def checkpointed(model: ResNetBKForCausalLM, reentrant: bool | None) -> None:
    if reentrant is not None:
        model.activation_checkpointing_enable({"use_reentrant": reentrant})


def train(model: ResNetBKForCausalLM, run: Any, parts: int, share: slice) -> list[Tensor]:
    """The weights after some steps, on a share of every part of every batch."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    for batch in TEXTS:
        for number, part in enumerate(batch.chunk(parts)):
            alone = isinstance(run, DistributedDataParallel) and number + 1 < parts
            with run.no_sync() if alone else nullcontext():
                loss = run(part[share], labels=part[share]).loss / parts
                loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
    return [p.full_tensor() if isinstance(p, DTensor) else p for p in model.parameters()]


def copied(model: ResNetBKForCausalLM) -> nn.Module:
    return DistributedDataParallel(model)  # not find_unused_parameters


def shared(model: ResNetBKForCausalLM) -> nn.Module:
    shard(model)
    return model


def check_idle(rank: int) -> None:
    """Some experts serve no token at all, and some serve tokens of one process only."""
    model = build(None)
    with counting_load(model) as load, torch.no_grad():
        model(TEXTS[0, 2 * rank : 2 * rank + 2])
    mine = torch.stack(load) > 0
    found = [torch.empty_like(mine) for _ in range(2)]
    dist.all_gather(found, mine)
    assert bool((~found[0] & ~found[1]).any())
    assert bool((found[0] != found[1]).any())


def main() -> None:
    logging.set_verbosity_error()
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    check_idle(rank)
    ways: dict[str, Callable[[ResNetBKForCausalLM], nn.Module]] = {"DDP": copied, "FSDP2": shared}
    # Codes are multiplied in float32, and Adam divides gradients by their size, and so their
    # rounding errors, too.
    for mode, tolerance in ((None, 1e-9), ("qat_int8", 1e-5)):
        alone = build(mode)
        expected = train(alone, alone, 1, slice(None))
        for name, share in ways.items():
            for reentrant in (None, False, True):
                for parts in (1, 2) if mode is None else (2,):
                    model = build(mode)
                    checkpointed(model, reentrant)
                    size = 2 // parts
                    mine = slice(rank * size, (rank + 1) * size)
                    found = train(model, share(model), parts, mine)
                    for one, other in zip(found, expected, strict=True):
                        torch.testing.assert_close(one, other, rtol=0, atol=tolerance)
                    if rank == 0:
                        print(f"{mode} {name} reentrant={reentrant} parts={parts}", flush=True)
    dist.barrier()
    leave(0)


if __name__ == "__main__":
    main()
