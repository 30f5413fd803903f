"""What `bkcore quantize` shows of a bit budget: sensitivities, and size against perplexity."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table

from bkcore.display.console import number
from bkcore.display.plots import write_plot

if TYPE_CHECKING:
    from bkcore.evaluation.sensitivity import Sensitivity
    from bkcore.quantization.budget import Assignment


def sensitivity_table(found: Sequence[Sensitivity], assignment: Assignment) -> Table:
    """Units by their loss at the narrowest width, the most sensitive first."""
    widths = sorted({entry.bits for entry in found})
    by_unit: dict[str, dict[int, Sensitivity]] = {}
    for entry in found:
        by_unit.setdefault(entry.unit, {})[entry.bits] = entry
    table = Table(
        title="sensitivity: effect of quantizing one unit alone, millinats per token",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        padding=(0, 1, 0, 0),
    )
    table.add_column("unit", no_wrap=True)
    for bits in widths:
        table.add_column(f"KL at\n{bits} bits", justify="right")
        table.add_column("change\nof loss", justify="right")
    table.add_column("bits\ngiven", justify="right")
    ranked = sorted(by_unit, key=lambda unit: -by_unit[unit][widths[0]].divergence)
    for unit in ranked:
        cells = []
        for entry in by_unit[unit].values():
            cells += [f"{1e3 * entry.divergence:.4f}", f"{1e3 * entry.loss_change:+.3f}"]
        table.add_row(unit, *cells, str(assignment[unit].bits))
    return table


def frontier_table(rows: Sequence[dict[str, Any]]) -> Table:
    """Size against perplexity, the smallest first."""
    table = Table(
        title="size and perplexity on held-out windows of the training text",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        padding=(0, 1, 0, 0),
    )
    table.add_column("model", no_wrap=True)
    for heading in ("bits a\nweight", "MB", "ppl per\ntoken", "change\n%", "95 %\ninterval"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("predicted\n%", justify="right")
    for row in sorted(rows, key=lambda row: row["bytes"]):
        predicted = row["predicted_pct"]
        table.add_row(
            row["name"],
            f"{row['average_bits']:.2f}",
            f"{row['bytes'] / 1e6:.2f}",
            number(row["ppl_token"], ".3f"),
            number(row["delta_pct"], "+.3f"),
            f"{number(row['ci_low_pct'], '+.3f')} to {number(row['ci_high_pct'], '+.3f')}",
            "" if predicted is None else number(predicted, "+.3f"),
        )
    return table


def _interval(row: dict[str, Any]) -> tuple[float, float, float]:
    return row["delta_pct"], row["ci_low_pct"], row["ci_high_pct"]


def draw_frontier(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw the change of perplexity against the size, with its intervals.

    Args:
        rows: of `Search.point`; those named "budget" and "saved" form the line. Rows that are not
            finite cannot be drawn and are left out.
        path: a .png or .svg file.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    rows = [row for row in rows if all(map(math.isfinite, _interval(row)))]
    ours = [row for row in rows if row["name"] in ("budget", "saved")]
    line = sorted(ours, key=lambda row: row["bytes"])
    modes = [row for row in rows if row not in ours]
    for points, style, label in ((line, "o-", "bit budget"), (modes, "s", "uniform modes")):
        if not points:
            continue
        middle = [row["delta_pct"] for row in points]
        below = [row["delta_pct"] - row["ci_low_pct"] for row in points]
        above = [row["ci_high_pct"] - row["delta_pct"] for row in points]
        sizes = [row["bytes"] / 1e6 for row in points]
        axes.errorbar(sizes, middle, (below, above), fmt=style, capsize=2, label=label)
    for row in rows:
        if row["name"] == "budget":
            continue
        place = (row["bytes"] / 1e6, row["delta_pct"])
        axes.annotate(row["name"], place, (5, 5), textcoords="offset points")
    axes.set_yscale("symlog", linthresh=0.1)
    axes.axhline(0, color="gray", linewidth=0.8)
    axes.set(xlabel="MB", ylabel="change of perplexity, %, held-out training text")
    axes.grid(visible=True, alpha=0.3)
    axes.legend()
    write_plot(figure, path)
