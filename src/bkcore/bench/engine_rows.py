"""The rows of `bkcore bench engines`: as JSON, as a table for a terminal, and as pairs of times."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

from rich import box
from rich.table import Table


@dataclass(frozen=True)
class Side:
    """One engine's time for a token, and what it had to do for it.

    Attributes:
        engine: its name and format, or what else tells the two sides of a row apart.
        parameters: all weights of its model.
        seconds: per token, the median.
        bytes: that must be read for a token: weights and state, or weights and cache. Those of a
            pass that takes many tokens are divided among them.
        operations: multiplications and additions for a token.
        plain_read_seconds: of a plain read of these bytes, timed in the same alternation.
        note: further remarks.
    """

    engine: str
    parameters: int
    seconds: float
    bytes: float
    operations: float
    plain_read_seconds: float
    note: str = ""

    @property
    def tokens_per_second(self) -> float:
        return 1 / self.seconds

    @property
    def of_plain_read(self) -> float:
        """Bytes per second over those of the plain read: 1 if reading alone takes the time."""
        return self.plain_read_seconds / self.seconds

    def as_dict(self) -> dict[str, Any]:
        """The side as written to the JSON file."""
        derived = {
            "tokens_per_second": self.tokens_per_second,
            "of_plain_read": self.of_plain_read,
        }
        return {**asdict(self), **derived}


@dataclass(frozen=True)
class Row:
    """Two times that were taken in alternation.

    Attributes:
        model: size and kind of ours, such as "100 M mixture".
        format: of ours, such as "INT8".
        work: "decode" or "read"; "together", many sequences against one; or "late", against early.
        context: tokens that were read before.
        threads: that both sides used.
        own: bkcore.
        other: what it is compared with; None if nothing is.
    """

    model: str
    format: str
    work: str
    context: int
    threads: int
    own: Side
    other: Side | None

    @property
    def ratio(self) -> float | None:
        """The other's time over ours; above 1 ours is faster."""
        return None if self.other is None else self.other.seconds / self.own.seconds

    def as_dict(self) -> dict[str, Any]:
        """The row as written to the JSON file."""
        return {
            **{name: getattr(self, name) for name in ("model", "format", "work", "context")},
            "threads": self.threads,
            "own": self.own.as_dict(),
            "other": None if self.other is None else self.other.as_dict(),
            "ratio": self.ratio,
        }


_COLUMNS = ("", "format", "thr.", "tokens/s", "read", "other", "read", "ratio")
_WORK = {
    "decode": "decode at {}",
    "read": "read on at {}",
    "together": "many to one, at {}",
    "late": "late, at {}",
}


def table(rows: Sequence[Row]) -> Table:
    """The rows for a terminal of 80 columns, by model."""
    grid = Table(
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        show_edge=False,
        caption="Tokens a second, of ours and of the other; ratio above 1: ours is faster. "
        "read: how fast the bytes that a token needs are read, as a part of a plain read's speed.",
        caption_justify="left",
    )
    for place, column in enumerate(_COLUMNS):
        grid.add_column(column, no_wrap=True, justify="left" if place < 2 else "right")
    for model, group in groupby(rows, key=lambda row: row.model):
        grid.add_section()
        grid.add_row(model, style="bold")
        for row in group:
            grid.add_row(*_cells(row))
    return grid


def _cells(row: Row) -> list[str]:
    sides = [cell for side in (row.own, row.other) for cell in _side(side)]
    ratio = "" if row.ratio is None else f"{row.ratio:.{1 if row.ratio >= 10 else 2}f}"
    return [
        _WORK[row.work].format(f"{row.context:,}"),
        row.format,
        str(row.threads),
        *sides,
        ratio,
    ]


def _side(side: Side | None) -> tuple[str, str]:
    if side is None:
        return "", ""
    return f"{side.tokens_per_second:,.0f}", f"{side.of_plain_read:.2f}"
