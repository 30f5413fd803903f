"""The folders that training resumes from: which of them are whole, and what they belong to.

The Trainer writes the files of a checkpoint in place. A marker, renamed into the folder when all of
them are there, tells a whole checkpoint from one that a kill cut short; it goes first when the
folder is deleted.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any

from bkcore.errors import CheckpointError
from bkcore.outputs import to_json
from bkcore.reading import read_json, shown

MARKER = "complete.json"

_NAME = re.compile(r"checkpoint-(\d+)")


def step_of(checkpoint: Path) -> int:
    """The step after which a checkpoint was saved."""
    return int(checkpoint.name.rpartition("-")[2])


def minutes_of(checkpoint: Path) -> float:
    """How long the training took up to a checkpoint."""
    minutes: float = _marker(checkpoint)["minutes"]
    return minutes


def mark_complete(checkpoint: Path, run: dict[str, Any], minutes: float) -> None:
    """Declare a checkpoint whole, and part of a run that `run` describes, as JSON can."""
    staged = checkpoint / f".{MARKER}"
    staged.write_text(to_json({"run": run, "minutes": minutes}), encoding="utf-8")
    os.replace(staged, checkpoint / MARKER)


def newest(folder: Path) -> Path | None:
    """The last whole checkpoint of a run's folder, if there is any."""
    whole = [path for path in _checkpoints(folder) if (path / MARKER).is_file()]
    return max(whole, key=step_of, default=None)


def remove_incomplete(folder: Path) -> None:
    """Delete what a kill left behind."""
    for path in _checkpoints(folder):
        if not (path / MARKER).is_file():
            shutil.rmtree(path)


def remove_all_but(folder: Path, kept: set[int]) -> None:
    """Delete the checkpoints of all steps but some."""
    for path in _checkpoints(folder):
        if step_of(path) not in kept:
            (path / MARKER).unlink(missing_ok=True)
            shutil.rmtree(path)


def check_same_run(checkpoint: Path, run: dict[str, Any]) -> None:
    """Refuse to continue a run under other settings than it began with.

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
            f"{checkpoint} belongs to another training: {'; '.join(changes)}. "
            "Resume with the same settings, start afresh (--no-resume), or name another folder"
        )


def _marker(checkpoint: Path) -> dict[str, Any]:
    path = checkpoint / MARKER
    try:
        marker = read_json(path)
        run, minutes = marker["run"], marker["minutes"]
        if not isinstance(run, dict) or type(minutes) not in (int, float) or not minutes >= 0:
            raise TypeError("it does not say which run it is of, and how long that took")
        return {"run": run, "minutes": float(minutes)}
    except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def _checkpoints(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if _NAME.fullmatch(path.name) and path.is_dir())
