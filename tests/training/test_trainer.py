"""Interrupted and resumed trainings, and what is refused."""

import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from bkcore.errors import CheckpointError, DataError, InputError
from bkcore.model import LanguageModel, ResNetBKForCausalLM
from bkcore.text import TokenWindows
from bkcore.training import Schedule, best_checkpoint, save_whole, shard, train
from bkcore.training.onednn import onednn_products
from tests.slow import combinations

SCHEDULE: dict[str, Any] = {"steps": 6, "batch_size": 4, "learning_rate": 5e-3, "save_every": 2}
TOKENS = torch.randint(0, 50, (30 * 16,), generator=torch.Generator().manual_seed(0))
WINDOWS = TokenWindows(TOKENS, 16)


def small(seed: int = 0, **options: Any) -> ResNetBKForCausalLM:
    torch.manual_seed(seed)
    sizes = {"d_model": 16, "n_layers": 1, "n_seq": 16, "num_experts": 2, "expert_size": 16}
    return LanguageModel(vocab_size=50, **{**sizes, **options})


def evaluation(model: PreTrainedModel) -> dict[str, float]:
    ids = TOKENS[:64].view(4, 16)
    with torch.no_grad():
        return {"loss": float(model.eval()(ids, labels=ids).loss)}


def weights(model: torch.nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def equal(left: list[Tensor], right: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


class Stop(Exception):
    pass


def stopped(output: Path, step: int, **schedule: Any) -> None:
    """Leave a training in the middle."""

    def on_step(done: int) -> None:
        if done == step:
            raise Stop

    with pytest.raises(Stop):
        train(
            small(), WINDOWS, Schedule(**{**SCHEDULE, **schedule}), output=output, on_step=on_step
        )


@pytest.mark.parametrize("optimizer", combinations(["adamw", "muon"], quick=["adamw"]))
def test_killed_at_any_moment_it_reaches_the_same_bits(tmp_path: Path, optimizer: str) -> None:
    script = Path(__file__).with_name("killed.py")
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path), optimizer],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert set(report["signals"].values()) == {9}, report
    whole, resumed, again = (
        load_file(tmp_path / f"{name}.safetensors") for name in ("whole", "resumed", "again")
    )
    for name, weight in whole.items():
        assert torch.equal(resumed[name], weight), name
        assert torch.equal(again[name], weight), name
    logs = [json.loads((tmp_path / f"{n}.json").read_text()) for n in ("whole", "resumed", "again")]
    assert logs[0] == logs[1] == logs[2]
    assert [entry["step"] for entry in logs[0] if "loss" in entry] == list(range(1, 14))
    assert [entry["step"] for entry in logs[0] if "eval_loss" in entry] == [5, 10, 13]


def test_without_an_output_nothing_is_kept(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    train(small(), WINDOWS, Schedule(**SCHEDULE))
    assert list(tmp_path.iterdir()) == []


def test_checkpoints_hold_no_pickle_that_nothing_needs(tmp_path: Path) -> None:
    train(small(), WINDOWS, Schedule(**SCHEDULE), output=tmp_path)
    (checkpoint,) = tmp_path.iterdir()
    assert checkpoint.name == "checkpoint-6"
    assert {path.name for path in checkpoint.iterdir()} == {
        *("bkcore.json", "config.json", "generation_config.json", "model.safetensors"),
        *("complete.json", "trainer_state.json"),
        *("optimizer.pt", "scheduler.pt", "rng_state.pth"),
    }
    ResNetBKForCausalLM.from_pretrained(checkpoint)


def test_starting_afresh_deletes_what_was_there(tmp_path: Path) -> None:
    stopped(tmp_path, step=5)
    fresh = small(seed=1)
    train(fresh, WINDOWS, Schedule(**{**SCHEDULE, "steps": 1}), output=tmp_path, resume=False)
    alone = small(seed=1)
    train(alone, WINDOWS, Schedule(**{**SCHEDULE, "steps": 1}))
    assert equal(weights(fresh), weights(alone))
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"schedule": {"learning_rate": 1e-3}}, r"learning_rate was 0\.005 and is 0\.001"),
        ({"schedule": {"steps": 7}}, "steps was 6 and is 7"),
        ({"seed": 5}, "seed was 0 and is 5"),
        ({"model": {"norm_eps": 0.1}}, r"model\.norm_eps was 1e-06 and is 0\.1"),
        ({"windows": TokenWindows(TOKENS[16:], 16)}, "windows was 30 and is 29"),
        ({"windows": TokenWindows(49 - TOKENS, 16)}, "sha256 of three windows was"),
    ],
)
def test_another_training_is_not_continued(
    tmp_path: Path, change: dict[str, Any], complaint: str
) -> None:
    stopped(tmp_path, step=3)
    with pytest.raises(CheckpointError, match=complaint):
        train(
            small(**change.get("model", {})),
            change.get("windows", WINDOWS),
            Schedule(**{**SCHEDULE, **change.get("schedule", {})}),
            seed=change.get("seed", 0),
            output=tmp_path,
        )


def test_the_best_weights_are_kept_and_loaded(tmp_path: Path) -> None:
    losses = iter([3.0, 1.0, 2.0, 2.5, 2.2, 2.1])
    model = small()
    seen: dict[float, list[Tensor]] = {}

    def scripted(model: PreTrainedModel) -> dict[str, float]:
        loss = next(losses)
        seen[loss] = weights(model)
        return {"loss": loss, "other": 7.0}

    schedule = Schedule(**{**SCHEDULE, "save_every": 5, "evaluate_every": 1})
    log = train(model, WINDOWS, schedule, output=tmp_path, evaluation=scripted)
    assert [entry["eval_loss"] for entry in log if "eval_loss" in entry] == [3, 1, 2, 2.5, 2.2, 2.1]
    assert best_checkpoint(tmp_path) == tmp_path / "checkpoint-2"
    assert equal(weights(model), seen[1.0])
    assert not equal(weights(model), seen[2.1])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2", "checkpoint-6"]


def test_patience_ends_a_training_for_good(tmp_path: Path) -> None:
    losses = iter([3.0, 4.0, 5.0, 0.0])
    schedule = Schedule(**SCHEDULE, evaluate_every=1, patience=2)
    arguments: dict[str, Any] = {"output": tmp_path, "evaluation": lambda _: {"loss": next(losses)}}
    log = train(small(), WINDOWS, schedule, **arguments)
    assert [entry["step"] for entry in log if "eval_loss" in entry] == [1, 2, 3]
    assert train(small(), WINDOWS, schedule, **arguments) == log
    assert next(losses) == 0.0


def test_a_time_limit_ends_a_training_with_an_evaluation(tmp_path: Path) -> None:
    schedule = Schedule(**SCHEDULE, evaluate_every=6, max_minutes=1e-9)
    log = train(small(), WINDOWS, schedule, output=tmp_path, evaluation=evaluation)
    assert [entry["step"] for entry in log if "eval_loss" in entry] == [1]
    more = Schedule(**SCHEDULE, evaluate_every=6, max_minutes=60)
    log = train(small(), WINDOWS, more, output=tmp_path, evaluation=evaluation)
    assert [entry["step"] for entry in log if "eval_loss" in entry] == [1, 6]


@pytest.mark.parametrize("scheduler", ["cosine", "linear", "warmup_stable_decay"])
def test_rates_fall_as_their_names_say(scheduler: str) -> None:
    schedule = Schedule(
        steps=10,
        batch_size=2,
        learning_rate=1.0e-3,
        warmup_fraction=0.2,
        scheduler=scheduler,
        decay_fraction=0.3,
        log_every=1,
    )
    rates = [entry["learning_rate"] / 1e-3 for entry in train(small(), WINDOWS, schedule)]
    assert rates[:3] == pytest.approx([0, 0.5, 1])
    if scheduler == "warmup_stable_decay":
        assert rates[2:8] == pytest.approx([1.0] * 6)
        assert rates[9] == pytest.approx(0.25)  # (1 + cos(2/3 pi)) / 2
    else:
        assert rates[6] == pytest.approx(0.5)


def test_parts_of_a_batch_add_up_to_the_batch() -> None:
    results = []
    for parts in (1, 4):
        model = small(load_balancing=0.0).double()
        train(model, WINDOWS, Schedule(**SCHEDULE, gradient_accumulation=parts))
        results.append(weights(model))
    for whole, in_parts in zip(*results, strict=True):
        torch.testing.assert_close(in_parts, whole, rtol=0, atol=1e-9)


def test_load_balancing_weighs_the_same_in_any_number_of_parts() -> None:
    """With equal windows its loss is the same for every part and for the whole."""
    windows = TokenWindows(TOKENS[:16].repeat(8), 16)
    results = []
    for parts in (1, 4):
        model = small(load_balancing=1.0).double()
        train(model, windows, Schedule(**SCHEDULE, gradient_accumulation=parts))
        results.append(weights(model))
    for whole, in_parts in zip(*results, strict=True):
        torch.testing.assert_close(in_parts, whole, rtol=0, atol=1e-9)


def test_impossible_requests(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="name an output folder"):
        train(small(), WINDOWS, Schedule(**SCHEDULE), evaluation=evaluation)
    with pytest.raises(InputError, match="patience counts evaluations"):
        train(small(), WINDOWS, Schedule(**SCHEDULE, patience=1), output=tmp_path)
    with pytest.raises(InputError, match="torchrun"):
        shard(small())
    with pytest.raises(InputError, match="not sharded"):
        save_whole(small(), tmp_path)
    with pytest.raises(DataError, match="30 training windows, fewer than one batch of 64"):
        train(small(), WINDOWS, Schedule(**{**SCHEDULE, "batch_size": 64}))
    with pytest.raises(CheckpointError, match="holds no complete checkpoint"):
        best_checkpoint(tmp_path)


def test_training_takes_onednn_and_leaves_the_setting_alone() -> None:
    mkldnn: Any = torch.backends.mkldnn  # whose type lacks `matmul`
    matmul = mkldnn.matmul
    before, seen = matmul.fp32_precision, set()
    with onednn_products():
        wanted = matmul.fp32_precision
    schedule = Schedule(steps=2, batch_size=4, learning_rate=5e-3)
    train(small(), WINDOWS, schedule, on_step=lambda _: seen.add(matmul.fp32_precision))
    assert seen == {wanted}
    assert matmul.fp32_precision == before


@pytest.fixture(params=[logging.ERROR, logging.WARNING, logging.INFO])
def level(request: pytest.FixtureRequest) -> Iterator[int]:
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(request.param)
    yield request.param
    transformers_logging.set_verbosity(before)


def test_the_callers_level_of_logging_stays(level: int) -> None:
    seen: list[int] = []
    train(
        LanguageModel(50, 16, 1, 16, num_experts=2, expert_size=16),
        TokenWindows(torch.arange(480) % 50, 16),
        Schedule(steps=1, batch_size=4, learning_rate=5e-3),
        on_step=lambda step: seen.append(transformers_logging.get_verbosity()),
    )
    assert [*seen, transformers_logging.get_verbosity()] == [level, level]
