"""One progress bar over several stages: the current one, its progress, and the time left."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from bkcore.display.console import say

_SILENCE = 60.0
"""Seconds between lines of a running stage if no terminal shows a bar."""


class Plan:
    """Stages that share one bar, with weights about proportional to the time they take.

    Args:
        stages: weight of each stage, in order.
        console: where to draw. Each finished stage prints a line. Without a terminal, a running
            stage also prints one every minute, so that a log file shows progress.
    """

    def __init__(self, stages: dict[str, float], console: Console) -> None:
        self._stages = stages
        self._done = 0.0
        self._count = 0
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            # Averaged over minutes, since the weights only roughly match the speed of the stages.
            TimeRemainingColumn(elapsed_when_finished=False),
            console=console,
            speed_estimate_period=120,
            transient=True,
        )
        self._task = self._progress.add_task("starting", total=sum(stages.values()))

    def __enter__(self) -> Plan:
        self._progress.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self._progress.stop()
        if kind is not None and issubclass(kind, KeyboardInterrupt):
            title = self._progress.tasks[0].description
            say(self._progress.console, f"interrupted in {title}")

    @contextmanager
    def stage(self, name: str) -> Iterator[Callable[..., None]]:
        """Run a stage.

        Yields:
            A function to call with the fraction of the stage that is done, and optionally a result
            so far, which is shown beside the bar and finally in the stage's line.
        """
        self._count += 1
        weight = self._stages[name]
        title = f"[{self._count}/{len(self._stages)}] {name}"
        self._progress.update(self._task, description=title)
        start = said = time.perf_counter()
        line = title

        def leave_line(what: str = "") -> None:
            separator = ": " if line == title else ", "
            seconds = f"{time.perf_counter() - start:.0f} s"
            say(self._progress.console, f"{line}{separator}{what}{seconds}")

        def advance(fraction: float, known: object = "") -> None:
            nonlocal line, said
            line = f"{title}: {known}" if known else title
            done = self._done + fraction * weight
            self._progress.update(self._task, completed=done, description=line)
            silent = time.perf_counter() - said
            if silent >= _SILENCE and not self._progress.console.is_terminal:
                said += silent
                leave_line(f"{100 * fraction:.0f} % after ")

        yield advance
        self._done += weight
        self._progress.update(self._task, completed=self._done)
        leave_line()
