"""Train in processes that kill themselves; run by test_trainer.py.

Usage: killed.py FOLDER OPTIMIZER. Nothing of torch runs before the forks, so they are safe.
"""

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.utils import logging

from bkcore.text import TokenWindows
from bkcore.training import Schedule, train

FOLDER = Path(sys.argv[1])
SCHEDULE = Schedule(
    optimizer=sys.argv[2],
    steps=13,
    batch_size=4,
    learning_rate=1e-2,
    save_every=3,
    evaluate_every=5,
    log_every=1,
)


def run(output: Path, weights: Path, on_step: Callable[[int], None] | None = None) -> None:
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    torch.manual_seed(1)
    # 5 batches an epoch, so that the third epoch is reached; dropout draws random numbers.
    tokens = torch.randint(0, 40, (22 * 8,))
    sizes: dict[str, Any] = {
        "n_embd": 16,
        "n_layer": 1,
        "n_head": 2,
        "n_positions": 8,
        "vocab_size": 40,
    }
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))

    def evaluation(model: Any) -> dict[str, float]:
        ids = tokens[:32].view(4, 8)
        with torch.no_grad():
            return {"loss": float(model.eval()(ids, labels=ids).loss)}

    windows = TokenWindows(tokens, 8)
    log = train(model, windows, SCHEDULE, output=output, evaluation=evaluation, on_step=on_step)
    save_file({name: p.detach() for name, p in model.named_parameters()}, weights)
    weights.with_suffix(".json").write_text(json.dumps(log))


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def in_child(work: Callable[[], None]) -> int:
    """Run in a process of its own; give the signal that ended it, or 0."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
    status = os.waitpid(pid, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


def killed_at(step: int) -> Callable[[], None]:
    return lambda: run(
        FOLDER / "killed", FOLDER / "none", lambda done: die() if done == step else None
    )


def killed_writing(name: str) -> Callable[[], None]:
    """Die when half of the first file of that name is written."""

    def work() -> None:
        original = torch.save

        def save(content: Any, path: Any, *args: Any, **kwargs: Any) -> None:
            original(content, path, *args, **kwargs)
            if Path(path).name == name:
                os.truncate(path, os.path.getsize(path) // 2)
                die()

        torch.save = save  # type: ignore[assignment]
        run(FOLDER / "killed", FOLDER / "none")

    return work


def killed_deleting() -> None:
    """Die when the weights of an old checkpoint are gone."""

    original = Path.unlink

    def unlink(path: Path, *args: Any, **kwargs: Any) -> None:
        original(path, *args, **kwargs)
        if path.name == "model.safetensors":
            die()

    Path.unlink = unlink  # type: ignore[assignment, method-assign]
    run(FOLDER / "killed", FOLDER / "none")


def main() -> None:
    transformers.logging.set_verbosity_error()
    assert in_child(lambda: run(FOLDER / "whole", FOLDER / "whole.safetensors")) == 0
    deaths = {
        "step 2": killed_at(2),
        "optimizer of step 3": killed_writing("optimizer.pt"),
        "step 5": killed_at(5),
        "random state of step 5 or 6": killed_writing("rng_state.pth"),
        "deleting": killed_deleting,
        "step 8": killed_at(8),
        "scheduler": killed_writing("scheduler.pt"),
        "step 13": killed_at(13),
    }
    signals, folders = {}, {}
    for name, work in deaths.items():
        signals[name] = in_child(work)
        folders[name] = sorted(path.name for path in (FOLDER / "killed").glob("*"))
    assert in_child(lambda: run(FOLDER / "killed", FOLDER / "resumed.safetensors")) == 0
    # A training that is over stays as it is.
    assert in_child(lambda: run(FOLDER / "killed", FOLDER / "again.safetensors")) == 0
    print(json.dumps({"signals": signals, "folders": folders}))


main()
