"""The report as tables for a terminal of 80 columns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.table import Table

from bkcore.comparison.synthetic import BUCKETS
from bkcore.display.console import bits_per_byte, number


def language_table(report: dict[str, Any]) -> Table:
    """Perplexities, with the change against the convolution-only ablation."""
    protocol = report["protocol"]["language"]
    evaluation = protocol["evaluation"]
    table = _table(
        f"{protocol['corpus']}, {evaluation['split']}: {evaluation['tokens']:,} tokens scored",
        ("model", "seed"),
        ("ppl\ntoken", "ppl\nword", "bits\nbyte", "change\n%", "95 %\ninterval"),
        ("active\nM", "total\nM", "tokens\nper s"),
    )
    table.caption = "change: against the same model without the core"
    for row in report["language"]:
        interval = (
            ""
            if "change_pct" not in row
            else f"{number(row['ci_low_pct'], '+.1f')} to {number(row['ci_high_pct'], '+.1f')}"
        )
        table.add_row(
            row["contestant"],
            str(row["seed"]),
            number(row["ppl_token"], ".2f"),
            number(row["ppl_word"], ".1f"),
            bits_per_byte(row["ppl_byte"]),
            number(row["change_pct"], "+.2f") if interval else "",
            interval,
            f"{row['active_parameters'] / 1e6:.3f}",
            f"{row['total_parameters'] / 1e6:.3f}",
            f"{row['tokens_per_second']:,.0f}",
        )
    return table


def synthetic_table(report: dict[str, Any]) -> Table:
    """Accuracies in percent, over all answers and by distance."""
    distances = tuple(f"{low} to\n{high - 1}" for low, high in BUCKETS)
    table = _table(
        "Accuracy in percent, by the distance to the answer",
        ("task", "model", "seed"),
        ("chance", "all", *distances),
        ("active\nM", "ms a\nstep"),
    )
    for row in report["synthetic"]:
        found = {entry["from"]: entry["accuracy"] for entry in row["accuracy_by_distance"]}
        table.add_row(
            row["task"],
            row["contestant"],
            str(row["seed"]),
            f"{100 * row['chance']:.1f}",
            f"{100 * row['accuracy']:.1f}",
            *(f"{100 * found[low]:.1f}" if low in found else "" for low, _ in BUCKETS),
            f"{row['active_parameters'] / 1e6:.3f}",
            f"{1e3 * row['seconds_per_step']:.0f}",
        )
    return table


def _table(title: str, names: Sequence[str], *numbers: Sequence[str]) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=0, show_edge=False)
    for heading in names:
        table.add_column(heading)
    for group in numbers:
        for heading in group:
            table.add_column(heading, justify="right", no_wrap=True)
    return table
