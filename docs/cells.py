"""Tables in Markdown, and how numbers look in their cells."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """A table whose columns after the first `left` are numbers, aligned at the right."""
    rule = ["---" if column < left else "---:" for column in range(len(header))]
    return "".join(f"| {' | '.join(row)} |\n" for row in (header, rule, *rows)).replace("|  ", "| ")


def shown(value: float | None, form: str, scale: float = 1.0) -> str:
    """A number, or nothing if none was measured."""
    return "" if value is None else format(value * scale, form)


def times(ratio: float) -> str:
    """A ratio: with two decimals below 1, with one from 1 on."""
    return f"{ratio:.1f}" if ratio >= 1 else f"{ratio:.2f}"


def code(name: str) -> str:
    """The name of a mode as code; any other text unchanged."""
    return f"`{name}`" if "_" in name else name


def duration(seconds: float) -> str:
    return f"{seconds:.2f}" if seconds < 10 else f"{seconds:.1f}"


def change(row: dict[str, Any], key: str = "delta_pct", digits: int = 2) -> list[str]:
    """A change in percent and its interval."""
    if row.get(key) is None:
        return ["", ""]
    form = f"+.{digits}f"
    return [f"{row[key]:{form}}", f"{row['ci_low_pct']:{form}} to {row['ci_high_pct']:{form}}"]
