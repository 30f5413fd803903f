"""Several processes train as one: with copies of the model, and with shares of it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bkcore.model import ResNetBKForCausalLM

SCRIPT = Path(__file__).with_name("two_processes.py")


def in_two_processes(script: Path, *arguments: str) -> str:
    return run(
        "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", script, *arguments
    )


def run(*arguments: str | Path) -> str:
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def weights(folder: Path) -> dict[str, Tensor]:
    return ResNetBKForCausalLM.from_pretrained(folder, dtype=torch.float64).state_dict()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("processes")
    run(SCRIPT, str(folder / "one"))
    in_two_processes(SCRIPT, str(folder / "two"))
    return folder


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("how", ["copied", "shared", "taught"])
def test_two_processes_train_as_one(results: Path, how: str, parts: int) -> None:
    expected = weights(results / "one" / ("taught-1" if how == "taught" else "copied-1"))
    name = f"{how}-{parts}"
    found = weights(results / "two" / name)
    assert found.keys() == expected.keys()
    for key, weight in expected.items():
        # Adam divides tiny gradients by their size, and so their rounding errors, too.
        torch.testing.assert_close(found[key], weight, rtol=0, atol=1e-11, msg=key)


def test_the_training_moved_the_weights(results: Path) -> None:
    (checkpoint,) = (results / "one" / "resume-1").iterdir()
    assert checkpoint.name == "checkpoint-4"
    moved = weights(results / "one" / "copied-1")["layers.0.mixer.out_proj.weight"]
    assert float(moved.abs().max()) > 1e-3  # it begins at zero


@pytest.mark.slow
def test_idle_experts_are_no_trouble_in_any_combination() -> None:
    """Without find_unused_parameters, with copies and shares, checkpoints and accumulation."""
    done = in_two_processes(SCRIPT.with_name("idle_experts.py"))
    assert len(done.splitlines()) == 2 * 3 * 2 + 2 * 3
