"""Folders of checkpoints: what is ours and deleted, what is somebody else's, and full disks."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel, Trainer, TrainerState

from bkcore.errors import CheckpointError, DivergenceError
from bkcore.model import LanguageModel
from bkcore.text import TokenWindows
from bkcore.training import Schedule, best_checkpoint, resuming, train

TOKENS = torch.randint(0, 50, (30 * 16,), generator=torch.Generator().manual_seed(0))
WINDOWS = TokenWindows(TOKENS, 16)
SCHEDULE = Schedule(steps=4, batch_size=4, learning_rate=5e-3, save_every=2)


def small(kind: str = "ours") -> PreTrainedModel:
    torch.manual_seed(0)
    if kind == "ours":
        sizes: dict[str, Any] = {
            "d_model": 16,
            "n_layers": 1,
            "n_seq": 16,
            "num_experts": 2,
            "expert_size": 16,
        }
        return LanguageModel(vocab_size=50, **sizes)
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16, "vocab_size": 50}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def files(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def foreign(folder: Path, step: int, *, marker: str | None = None) -> Path:
    """A checkpoint of somebody else."""
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    (path / "weights.bin").write_text("precious")
    if marker is not None:
        (path / "complete.json").write_text(marker)
    return path


# ---- what is somebody else's ---------------------------------------------------------------


@pytest.mark.parametrize("resume", [True, False])
@pytest.mark.parametrize("marker", [None, "", "{}", '{"run": 1, "minutes": 2}', "[]"])
def test_a_foreign_checkpoint_is_left_alone(tmp_path, resume, marker):
    foreign(tmp_path, 500, marker=marker)
    (tmp_path / "checkpoint-007").mkdir()
    (tmp_path / "checkpoint-900").write_text("no folder")
    before = files(tmp_path)
    for _ in range(2):
        train(small(), WINDOWS, SCHEDULE, output=tmp_path, resume=resume)
        found = files(tmp_path)
        assert {name: found[name] for name in before} == before
        expected = ["checkpoint-007", "checkpoint-4", "checkpoint-500", "checkpoint-900"]
        assert names(tmp_path) == expected
    assert best_checkpoint(tmp_path) == tmp_path / "checkpoint-4"


@pytest.mark.parametrize("kind", ["folder", "file", "link", "link to ours", "dangling link"])
@pytest.mark.parametrize("resume", [True, False])
def test_what_is_in_the_way_is_said_before_the_work(tmp_path, kind, resume):
    output, place = tmp_path / "out", tmp_path / "out" / "checkpoint-2"
    output.mkdir()
    if kind == "folder":
        foreign(output, 2)
    elif kind == "file":
        place.write_text("precious")
    else:
        target = foreign(tmp_path / "elsewhere", 2)
        if kind == "link to ours":
            resuming.begin(target)
        if kind == "dangling link":
            shutil.rmtree(target)
        place.symlink_to(target)
    before, steps = files(tmp_path), list[int]()
    with pytest.raises(CheckpointError, match=r"checkpoint-2 .*is in the way of a checkpoint"):
        train(small(), WINDOWS, SCHEDULE, output=output, resume=resume, on_step=steps.append)
    assert steps == []
    assert files(tmp_path) == before
    assert place.is_symlink() == ("link" in kind)


def test_a_link_to_a_checkpoint_is_not_resumed_from(tmp_path):
    train(small(), WINDOWS, SCHEDULE, output=tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "checkpoint-4").symlink_to(tmp_path / "a" / "checkpoint-4")
    before = files(tmp_path / "a")
    with pytest.raises(CheckpointError, match="is a link"):
        train(small(), WINDOWS, SCHEDULE, output=tmp_path / "b")
    with pytest.raises(CheckpointError, match="holds no complete checkpoint"):
        best_checkpoint(tmp_path / "b")
    assert files(tmp_path / "a") == before


def test_an_empty_folder_is_written_to_and_a_file_is_no_output(tmp_path):
    (tmp_path / "out" / "checkpoint-2").mkdir(parents=True)
    train(small(), WINDOWS, SCHEDULE, output=tmp_path / "out")
    assert names(tmp_path / "out") == ["checkpoint-4"]
    (tmp_path / "file").write_text("precious")
    with pytest.raises(CheckpointError, match="cannot write checkpoints to"):
        train(small(), WINDOWS, SCHEDULE, output=tmp_path / "file")
    assert (tmp_path / "file").read_text() == "precious"


def test_only_its_own_checkpoints_are_rotated(tmp_path):
    """Another training's, put into the same folder, stays while one resumes."""
    other = Schedule(steps=2, batch_size=4, learning_rate=1e-3, save_every=2)
    train(small(), WINDOWS, other, output=tmp_path / "other")
    stopped(tmp_path / "out", 3)
    shutil.copytree(tmp_path / "other" / "checkpoint-2", tmp_path / "out" / "checkpoint-1")
    train(small(), WINDOWS, SCHEDULE, output=tmp_path / "out")
    assert names(tmp_path / "out") == ["checkpoint-1", "checkpoint-4"]
    train(small(), WINDOWS, SCHEDULE, output=tmp_path / "out", resume=False)
    assert names(tmp_path / "out") == ["checkpoint-4"]


class Stop(Exception):
    pass


def stopped(output: Path, step: int) -> None:
    def on_step(done: int) -> None:
        if done == step:
            raise Stop

    with pytest.raises(Stop):
        train(small(), WINDOWS, SCHEDULE, output=output, on_step=on_step)


def test_links_inside_a_checkpoint_are_not_followed(tmp_path):
    precious = foreign(tmp_path / "elsewhere", 1)
    stopped(tmp_path / "out", 3)
    (tmp_path / "out" / "checkpoint-2" / "link").symlink_to(precious)
    train(small(), WINDOWS, SCHEDULE, output=tmp_path / "out")
    assert names(tmp_path / "out") == ["checkpoint-4"]
    assert (precious / "weights.bin").read_text() == "precious"


# ---- what is half written ------------------------------------------------------------------


def test_half_a_deletion_is_finished_and_not_resumed_from(tmp_path, monkeypatch):
    stopped(tmp_path, 3)
    original = Path.unlink

    def unlink(path: Path, *args: Any, **kwargs: Any) -> None:
        original(path, *args, **kwargs)
        if path.name == "config.json":
            raise Stop

    monkeypatch.setattr(Path, "unlink", unlink)
    with pytest.raises(Stop):
        train(small(), WINDOWS, SCHEDULE, output=tmp_path)
    monkeypatch.undo()
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-4"]
    assert resuming.newest(tmp_path) == tmp_path / "checkpoint-4"
    shutil.rmtree(tmp_path / "checkpoint-4")
    assert resuming.newest(tmp_path) is None
    train(small(), WINDOWS, SCHEDULE, output=tmp_path)
    assert names(tmp_path) == ["checkpoint-4"]


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("model.safetensors", lambda path: os.truncate(path, 100)),
        ("model.safetensors", Path.unlink),
        ("optimizer.pt", lambda path: os.truncate(path, 100)),
        ("rng_state.pth", lambda path: os.truncate(path, 10)),
        ("trainer_state.json", lambda path: path.write_text("{")),
    ],
)
def test_a_damaged_checkpoint_is_named(tmp_path, file, damage: Callable[[Path], Any]):
    stopped(tmp_path, 3)
    damage(tmp_path / "checkpoint-2" / file)
    with pytest.raises(CheckpointError, match="checkpoint-2"):
        train(small(), WINDOWS, SCHEDULE, output=tmp_path)


# ---- full disks ----------------------------------------------------------------------------

FULL = OSError(errno.ENOSPC, "No space left on device")


def fail(error: Exception, *, half: bool = False) -> Callable[..., None]:
    def work(*args: Any, **_: Any) -> None:
        for each in args:
            if half and isinstance(each, str | Path) and not Path(each).is_dir():
                Path(each).write_text("half")
        raise error

    return work


FAILURES: dict[str, tuple[Any, str, Exception]] = {
    "weights": (PreTrainedModel, "save_pretrained", SafetensorError("I/O error: no space left")),
    "folder": (Path, "mkdir", FULL),
    "mark": (Path, "touch", FULL),
    "optimizer": (torch, "save", RuntimeError("PytorchStreamWriter failed writing file")),
    "state": (TrainerState, "save_to_json", FULL),
    "random state": (Trainer, "_save_rng_state", FULL),
    "rate": (Trainer, "_save_scaler", FULL),
    "marker": (resuming, "mark_complete", FULL),
    "rename": (os, "replace", FULL),
}


@pytest.mark.parametrize("kind", ["ours", "GPT-2"])
@pytest.mark.parametrize("what", FAILURES)
def test_a_full_disk_is_said_in_words_and_leaves_nothing_half_written(
    tmp_path, monkeypatch, what, kind
):
    """At the second checkpoint; the first stays whole, and training goes on from there."""
    owner, name, error = FAILURES[what]

    def on_step(step: int) -> None:
        if step == 3:
            monkeypatch.setattr(owner, name, fail(error, half=what == "optimizer"))

    with pytest.raises(CheckpointError, match="cannot write"):
        train(small(kind), WINDOWS, SCHEDULE, output=tmp_path, on_step=on_step)
    monkeypatch.undo()
    assert names(tmp_path) == ["checkpoint-2"]
    assert resuming.newest(tmp_path) == tmp_path / "checkpoint-2"
    whole, resumed = small(kind), small(kind)
    train(whole, WINDOWS, SCHEDULE)
    train(resumed, WINDOWS, SCHEDULE, output=tmp_path)
    for one, other in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_disk_too_full_to_delete_leaves_a_mark(tmp_path, monkeypatch):
    def on_step(step: int) -> None:
        if step == 3:
            monkeypatch.setattr(torch, "save", fail(FULL))
            monkeypatch.setattr(resuming, "_delete", fail(OSError(errno.EROFS, "read-only")))

    with pytest.raises(CheckpointError, match="No space left"):
        train(small(), WINDOWS, SCHEDULE, output=tmp_path, on_step=on_step)
    monkeypatch.undo()
    assert resuming.newest(tmp_path) == tmp_path / "checkpoint-2"
    train(small(), WINDOWS, SCHEDULE, output=tmp_path)
    assert names(tmp_path) == ["checkpoint-4"]


def test_what_ran_away_writes_nothing(tmp_path):
    model = small()

    def on_step(step: int) -> None:
        if step == 3:
            next(model.parameters()).data.fill_(torch.nan)

    with pytest.raises(DivergenceError):
        train(model, WINDOWS, SCHEDULE, output=tmp_path, on_step=on_step)
    assert names(tmp_path) == ["checkpoint-2"]
    assert json.loads((tmp_path / "checkpoint-2" / "complete.json").read_text())["minutes"] >= 0
