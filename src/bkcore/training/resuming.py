"""The checkpoint folders that training resumes from: whether they are complete, and whose they are.

The Trainer writes the files of a checkpoint in place. So a file written before all others marks the
folder as ours, and a marker, renamed into the folder last, tells a complete checkpoint from one cut
short by a kill. A folder with neither belongs to somebody else: it is never resumed from, deleted
or written to.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from accelerate import PartialState
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import PreTrainedModel, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import SAFE_WEIGHTS_NAME

from bkcore.errors import BKCoreError, CheckpointError
from bkcore.outputs import to_json
from bkcore.reading import foreign, read_json, shown
from bkcore.training.schedule import Schedule

MARKER = "complete.json"
BEGUN = ".bkcore-checkpoint"
"""An empty file in an incomplete folder of ours, one being written or deleted."""

_NAME = re.compile(r"checkpoint-(0|[1-9]\d*)")


def step_of(checkpoint: Path) -> int:
    """The step after which a checkpoint was saved."""
    return int(checkpoint.name.rpartition("-")[2])


def minutes_of(checkpoint: Path) -> float:
    """Minutes of training up to a checkpoint."""
    minutes: float = _marker(checkpoint)["minutes"]
    return minutes


@contextmanager
def writing(checkpoint: Path) -> Iterator[None]:
    """If the block cannot write a checkpoint, say which one, and delete what was written.

    Raises:
        CheckpointError: if the disk is full, say, or the folder is not writable.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError, BKCoreError) as error:
        with suppress(OSError):  # if this fails, the next training deletes it
            _delete(checkpoint)
        if isinstance(error, BKCoreError):
            raise
        raise CheckpointError(
            f"cannot write the checkpoint {checkpoint}: {error}; make room for it or name another "
            "folder, then resume"
        ) from error


@contextmanager
def reading(checkpoint: Path) -> Iterator[None]:
    """If the block cannot read a checkpoint, say which one is damaged.

    Raises:
        CheckpointError: if one of its files is missing, truncated or altered.
    """
    try:
        yield
    except BKCoreError:
        raise
    except (OSError, RuntimeError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{checkpoint} cannot be read: {error}; delete it to resume from an earlier one, if "
            "there is one"
        ) from error


def begin(checkpoint: Path) -> None:
    """Create the folder of a checkpoint, or take an empty one, and mark it as ours."""
    checkpoint.mkdir(parents=True, exist_ok=True)
    try:
        (checkpoint / BEGUN).touch()
    except OSError:
        checkpoint.rmdir()
        raise


def mark_complete(checkpoint: Path, run: dict[str, Any], minutes: float) -> None:
    """Mark a checkpoint as complete, and as part of the run that `run` describes in JSON values."""
    staged = checkpoint / f".{MARKER}"
    staged.write_text(to_json({"run": run, "minutes": minutes}), encoding="utf-8")
    os.replace(staged, checkpoint / MARKER)
    (checkpoint / BEGUN).unlink()


def newest(folder: Path) -> Path | None:
    """The last complete checkpoint in a run's folder, if there is one."""
    return max(filter(_is_whole, _checkpoints(folder)), key=step_of, default=None)


def prepare(folder: Path, start: int, last: int) -> None:
    """Create the folder of a run, and check that nothing in it is in the way.

    Args:
        folder: of the run.
        start: the step after which the training begins.
        last: the step at which it ends.

    Raises:
        CheckpointError: if the folder cannot be created, or something not ours has the name of a
            checkpoint that this run may write.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        found = sorted(folder.iterdir())
    except OSError as error:
        raise CheckpointError(f"cannot write checkpoints to {folder}: {error}") from error
    ours = set(_checkpoints(folder))
    for path in found:
        match = _NAME.fullmatch(path.name)
        if match is None or path in ours or not start < int(match[1]) <= last:
            continue
        if path.is_symlink() or not path.is_dir() or any(path.iterdir()):
            raise CheckpointError(
                f"{path} is in the way of a checkpoint, and was not written by this kind of "
                "training, or is a link; move it, or name another folder"
            )


def remove_incomplete(folder: Path) -> None:
    """Delete incomplete checkpoints that a kill left behind."""
    for path in _checkpoints(folder):
        if not _is_whole(path):
            _delete(path)


def remove_all_but(folder: Path, kept: set[int], run: dict[str, Any] | None = None) -> None:
    """Delete the checkpoints of one run, or of any training, except those of some steps."""
    for path in _checkpoints(folder):
        own = run is None or not _is_whole(path) or _marker(path)["run"] == run
        if own and step_of(path) not in kept:
            _delete(path)


def check_same_run(checkpoint: Path, run: dict[str, Any]) -> None:
    """Refuse to continue a run with settings other than those it began with.

    Raises:
        CheckpointError: naming what differs.
    """
    saved = _marker(checkpoint)["run"]
    changes = [
        f"{shown(name)[1:-1]} was {shown(saved.get(name))} and is {shown(run.get(name))}"
        for name in sorted(saved.keys() | run.keys())
        if saved.get(name) != run.get(name)
    ]
    if changes:
        raise CheckpointError(
            f"{checkpoint} belongs to another training: {'; '.join(changes)}; "
            "resume with the same settings, start afresh (--no-resume), or name another folder"
        )


def start_of(
    output: Path, resume: bool, run: dict[str, Any], steps: int, processes: PartialState
) -> Path | None:
    """The checkpoint to continue a training from, or None to begin; deletes what must not stay.

    Args:
        output: the folder of the training.
        resume: False deletes our checkpoints there.
        run: describes the training in JSON values.
        steps: the step at which it ends.
        processes: synchronizes the processes; all of them must call this.

    Raises:
        CheckpointError: as in `check_same_run` and `prepare`.
    """
    start = newest(output) if resume else None
    if start is not None:
        check_same_run(start, run)
    prepare(output, 0 if start is None else step_of(start), steps)
    processes.wait_for_everyone()  # until all have looked, nothing is deleted
    if processes.is_main_process:
        if resume:
            remove_incomplete(output)
        else:
            remove_all_but(output, set())
    processes.wait_for_everyone()
    return start


def state_of(checkpoint: Path) -> TrainerState:
    """The Trainer's state in a checkpoint.

    Raises:
        CheckpointError: if it is damaged.
    """
    path = checkpoint / TRAINER_STATE_NAME
    with foreign(str(path)):
        read_json(path)  # checks the size, which transformers does not
        state = TrainerState.load_from_json(str(path))
    best = state.best_global_step
    if not (best is None or type(best) is int) or not isinstance(state.log_history, list):
        raise CheckpointError(f"{path} is damaged: it does not hold the state of a training")
    return state


def is_over(checkpoint: Path, schedule: Schedule) -> bool:
    """Whether the training ended at this checkpoint, rather than being interrupted."""
    out_of_time = (
        schedule.max_minutes is not None and minutes_of(checkpoint) >= schedule.max_minutes
    )
    states: Any = state_of(checkpoint).stateful_callbacks  # annotated for a new run only
    out_of_patience = (
        "EarlyStoppingCallback" in states
        and states["EarlyStoppingCallback"]["attributes"]["early_stopping_patience_counter"]
        >= schedule.patience
    )
    return step_of(checkpoint) >= schedule.steps or out_of_time or out_of_patience


def load_weights(model: PreTrainedModel, checkpoint: Path) -> None:
    """Load the weights of a checkpoint into a model.

    Raises:
        CheckpointError: if they cannot be read.
    """
    # Not strict: of weights that are tied, a file holds one.
    with reading(checkpoint):
        weights = load_file(checkpoint / SAFE_WEIGHTS_NAME)
    model.load_state_dict(weights, strict=False)


def best_checkpoint(output: Path) -> Path:
    """The checkpoint of a training folder that evaluated best, or the last if none was evaluated.

    Raises:
        CheckpointError: if there is no complete checkpoint.
    """
    last = newest(output)
    if last is None:
        raise CheckpointError(f"{output} holds no complete checkpoint of a training")
    best = state_of(last).best_global_step
    return last if best is None else output / f"checkpoint-{best}"


def _marker(checkpoint: Path) -> dict[str, Any]:
    path = checkpoint / MARKER
    try:
        marker = read_json(path)
        run, minutes = marker["run"], marker["minutes"]
        if not isinstance(run, dict) or type(minutes) not in (int, float) or not minutes >= 0:
            raise TypeError("it does not say which run it belongs to and how long that took")
        return {"run": run, "minutes": float(minutes)}
    except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def _is_whole(checkpoint: Path) -> bool:
    if (checkpoint / BEGUN).exists():
        return False
    try:
        _marker(checkpoint)
    except CheckpointError:
        return False
    return True


def _checkpoints(folder: Path) -> list[Path]:
    """The checkpoints that carry our mark and are not links to somewhere else."""
    if not folder.is_dir():
        return []
    named = [path for path in sorted(folder.iterdir()) if _NAME.fullmatch(path.name)]
    real = [path for path in named if path.is_dir() and not path.is_symlink()]
    return [path for path in real if (path / BEGUN).exists() or _is_whole(path)]


def _delete(checkpoint: Path) -> None:
    """Delete one of our checkpoints; if killed midway, it stays marked as incomplete and ours."""
    (checkpoint / BEGUN).touch()
    for path in checkpoint.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != BEGUN:
            path.unlink()
    (checkpoint / BEGUN).unlink()
    checkpoint.rmdir()
