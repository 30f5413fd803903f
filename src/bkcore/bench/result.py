"""One rule for every row: how many times as fast as its baseline it is."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rich import box
from rich.table import Table

from bkcore.bench.machine import machine

COLUMNS = ("name", "shape", "threads", "time", "ratio", "to", "target", "met")


@dataclass(frozen=True)
class Result:
    """One measurement.

    Attributes:
        name: case and form, such as "large/g".
        shape: of the potential.
        threads: how many PyTorch was allowed.
        seconds: per call, the median.
        baseline_seconds: the same for the baseline, timed in alternation, or a limit.
        baseline: what the baseline is.
        target: the least ratio wanted; None if there is none.
        note: further remarks.
    """

    name: str
    shape: tuple[int, ...]
    threads: int
    seconds: float
    baseline_seconds: float
    baseline: str
    target: float | None = None
    note: str = ""

    @property
    def ratio(self) -> float:
        """The baseline's time over this time; above 1 is faster than the baseline."""
        return self.baseline_seconds / self.seconds

    @property
    def met(self) -> bool | None:
        return None if self.target is None else self.ratio >= self.target

    def as_dict(self) -> dict[str, Any]:
        """The row as written to the JSON file."""
        row = {
            "name": self.name,
            "shape": list(self.shape),
            "threads": self.threads,
            "seconds": self.seconds,
            "baseline": self.baseline,
            "baseline_seconds": self.baseline_seconds,
            "ratio": self.ratio,
            "target": self.target,
            "met": self.met,
        }
        return {**row, "note": self.note} if self.note else row


def report(results: Sequence[Result]) -> dict[str, Any]:
    """The JSON file: the machine, and every row."""
    return {"machine": machine(), "results": [result.as_dict() for result in results]}


def table(results: Iterable[Result]) -> Table:
    """The rows for a terminal of 80 columns."""
    grid = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    for column in COLUMNS:
        heading = column.replace("threads", "thr.")
        grid.add_column(
            heading, no_wrap=column != "name", justify=_justify(column), overflow="fold"
        )
    for result in results:
        grid.add_row(*_cells(result), style="red" if result.met is False else "")
    return grid


def markdown_table(results: Iterable[Result]) -> str:
    """The rows as a Markdown table."""
    lines = [["---:" if _justify(column) == "right" else "---" for column in COLUMNS]]
    rows = [list(COLUMNS), *lines, *map(_cells, results)]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _justify(column: str) -> Literal["left", "right"]:
    return "right" if column in ("shape", "threads", "time", "ratio", "target") else "left"


def _cells(result: Result) -> list[str]:
    return [
        result.name,
        "x".join(map(str, result.shape)),
        str(result.threads),
        _duration(result.seconds),
        f"{result.ratio:.2f}",
        result.baseline,
        "" if result.target is None else f"{result.target:.2f}",
        {None: "", True: "yes", False: "no"}[result.met],
    ]


def _duration(seconds: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"
