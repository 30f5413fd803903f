"""Runs that can be interrupted, continued, and shared among processes.

Each run has its own folder. `run.json` holds its settings from the start, so that a folder never
mixes two settings. `result.json` appears, complete, when the run is finished; until then the folder
holds the trainer's checkpoints. A lock keeps two processes from doing the same run.
"""

from __future__ import annotations

import fcntl
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

from bkcore.errors import InputError
from bkcore.outputs import write_json
from bkcore.reading import read_json

_OWN = {"learning_rate", "open_size", "seed", "task"}
"""Settings that may differ between runs of one group."""

Advance = Callable[[float], None]
"""Called with the fraction of the run that is done."""


@dataclass(frozen=True)
class Run:
    """One training with its measurement.

    Attributes:
        name: `group/contestant/seedN`, also the folder below the root of all runs.
        settings: returns what the result depends on, in JSON values.
        execute: does the work in a folder and returns the result, in JSON values.
        weight: about how many seconds it takes.
    """

    name: str
    settings: Callable[[], dict[str, Any]]
    execute: Callable[[Path, Advance], dict[str, Any]]
    weight: float

    def check(self, root: Path) -> None:
        """Check that the run can be done, and that its folder was not begun with other settings.

        Raises:
            InputError: otherwise; the message names the settings that differ.
        """
        path = root / self.name / "run.json"
        now = self.settings()
        begun = _read(path) if path.is_file() else now
        names = sorted({*begun, *now})
        different = [name for name in names if begun.get(name) != now.get(name)]
        if different:
            raise InputError(
                f"{path.parent} was begun with other settings: "
                + _differences(different, begun, now)
                + "; name another --output, or remove that folder"
            )

    def check_together(self, root: Path) -> None:
        """Check that the result will be comparable with the finished ones of its group.

        Raises:
            InputError: if a setting that all runs of a group share differs from one of theirs.
        """
        now = self.settings()
        shared = sorted(now.keys() - _OWN)
        for path in sorted(root.glob(f"{self.name.partition('/')[0]}/*/*/result.json")):
            other = _read(path.with_name("run.json"))
            different = [name for name in shared if other.get(name) != now[name]]
            if different:
                raise InputError(
                    f"{path.parent} was done with other settings, so {self.name} cannot be "
                    f"compared with it: {_differences(different, other, now)}; name another "
                    "--output"
                )

    def finish(self, root: Path, advance: Advance) -> bool:
        """Do the run, or what is left of it; a finished run takes no time.

        Returns:
            False if another process is doing it.
        """
        folder = root / self.name
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder / "lock") as ours:
            if ours and not (folder / "result.json").is_file():
                self.check(root)
                write_json(self.settings(), folder / "run.json")
                result = self.execute(folder, advance)
                write_json(result, folder / "result.json")
        return ours


def finished(root: Path, group: str) -> list[dict[str, Any]]:
    """Results of the finished runs of a group, ordered by folder."""
    return [_read(path) for path in sorted(root.glob(f"{group}/*/*/result.json"))]


def _read(path: Path) -> dict[str, Any]:
    try:
        return dict(read_json(path))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(
            f"{path} cannot be read ({error}); remove its folder to do the run again"
        ) from error


def _differences(names: Sequence[str], before: dict[str, Any], now: dict[str, Any]) -> str:
    return ", ".join(f"{name} {before.get(name)!r}, now {now.get(name)!r}" for name in names)


@contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Whether this process holds the lock; the system frees it when a process dies."""
    with path.open("w", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


class StepTimes:
    """Seconds of each training step, kept in a file so that they survive an interruption."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._last = perf_counter()

    def __call__(self, step: int) -> None:
        """Record that a step has just ended."""
        now = perf_counter()
        with self._path.open("a", encoding="utf-8") as file:
            file.write(f"{step} {now - self._last:.6f}\n")
        self._last = now

    def seconds(self) -> dict[str, float]:
        """Seconds of all steps together, and of the median step; a repeated step counts once."""
        # A process killed while writing leaves half a line; that step is then done again.
        lines = [line.split() for line in self._path.read_text(encoding="utf-8").splitlines()]
        times = {int(line[0]): float(line[1]) for line in lines if len(line) == 2}
        return {"seconds": sum(times.values()), "seconds_per_step": median(times.values())}
