"""A budget of bits: which weights get how many, what it costs, and how the modes compare.

Nothing here looks at the validation split: sensitivities come from calibration windows, and what
is chosen by perplexity is chosen on other windows of the training text.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.table import Table
from torch import Tensor

from bkcore.errors import InputError
from bkcore.evaluation.perplexity import Scores, paired_change, perplexity_per_token, score
from bkcore.evaluation.sensitivity import Sensitivity, choices, tensor_bits
from bkcore.model import ResNetBKForCausalLM
from bkcore.model.conversion import quantizable, storage_bytes
from bkcore.quantization.budget import (
    Assignment,
    Choice,
    allocate,
    frontier,
    total_bytes,
    total_loss,
)
from bkcore.quantization.weights import PackedWeight
from bkcore.report.console import number
from bkcore.report.files import write_plot
from bkcore.report.receipt import average_bits

_FRONTIER_POINTS = 7


@dataclass(frozen=True)
class Judge:
    """Scores models on one text, against the float model.

    Attributes:
        tokens: int64 (tokens,), windows put together.
        window: their length.
        batch_size: windows a batch.
        bos_id: what stands before the first token.
    """

    tokens: Tensor
    window: int
    batch_size: int
    bos_id: int

    def __call__(self, model: ResNetBKForCausalLM) -> Scores:
        """Score a model."""
        return score(
            model,
            self.tokens,
            window=self.window,
            batch_size=self.batch_size,
            bos_id=self.bos_id,
        )


def check_target(model: ResNetBKForCausalLM, target_bits: float, group_size: int) -> None:
    """Raise `InputError` if no assignment has so few bits a weight on average, scales included."""
    shapes = [tuple(slot.layer.weight.shape) for slot in quantizable(model)]
    smallest = sum(_narrowest(rows, columns, group_size) for rows, columns in shapes)
    least = 8 * smallest / sum(rows * columns for rows, columns in shapes)
    if target_bits < least:
        raise InputError(
            f"INT4 in groups of {group_size}, or what is narrower, has {least:.3f} bits a weight "
            f"here, scales included, and {target_bits:g} are wanted: allow more bits, or share "
            "scales among more weights"
        )


def _narrowest(rows: int, columns: int, group_size: int) -> int:
    """Bytes of a weight at the bits that take least: scales of small groups may outweigh codes."""
    with torch.device("meta"):
        packed = [
            PackedWeight((rows, columns), 4, min(group_size, columns)),
            PackedWeight((rows, columns), 8, columns),
        ]
    return min(2 * rows * columns, *map(storage_bytes, packed))


class Search:
    """Assignments of bits to the units of one calibrated model.

    Args:
        calibrated: ready for `apply_ptq`; it stays as it is.
        found: the sensitivities of all its units.
        judge: scores on held-out text.
    """

    def __init__(
        self, calibrated: ResNetBKForCausalLM, found: Sequence[Sensitivity], judge: Judge
    ) -> None:
        self.calibrated = calibrated
        self.judge = judge
        self.choices = choices(calibrated, found)
        widest = {unit: max(widths, key=_bytes) for unit, widths in self.choices.items()}
        self.bytes_a_bit = sum(choice.bytes / choice.bits for choice in widest.values())
        self.reference = judge(calibrated)  # its forward passes are float still

    def within(self, bits: float) -> Assignment:
        """The best assignment of at most so many bits a weight on average, scales included.

        Raises:
            InputError: if the narrowest widths have more.
        """
        # Sizes are whole bytes; a bound that is one of them must not fall below it by rounding.
        return allocate(self.choices, bits * self.bytes_a_bit + 1e-3)

    def quantize(self, assignment: Assignment) -> ResNetBKForCausalLM:
        """The model with these bits."""
        model = copy.deepcopy(self.calibrated)
        bits = {unit: choice.bits for unit, choice in assignment.items()}
        model.assign_bits(tensor_bits(model, bits))
        model.apply_ptq()
        return model

    def smallest_within(
        self, max_increase: float, on_progress: Callable[[float], None]
    ) -> tuple[ResNetBKForCausalLM, Assignment]:
        """The smallest model of the frontier whose perplexity rises by at most so many percent.

        What counts is the upper end of the 95 % interval of the measured increase. It is looked
        for by bisection, which takes the increase to fall along the frontier.

        Raises:
            InputError: if even the last of the frontier is not within it.
        """
        assignments = frontier(self.choices)
        low, high, best = 0, len(assignments) - 1, None
        rounds, done = math.ceil(math.log2(len(assignments) + 1)), 0
        while best is None or low < high:
            middle = high if best is None else (low + high) // 2
            model = self.quantize(assignments[middle])
            change = paired_change(self.reference, self.judge(model))
            done += 1
            on_progress(min(1.0, done / (rounds + 1)))
            if change.high_pct <= max_increase:
                high, best = middle, (model, assignments[middle])
            elif best is None:
                raise InputError(
                    f"perplexity rises by up to {change.high_pct:.3f} % even with all weights in "
                    f"the widths of least loss; allow more than {max_increase} %, or give more "
                    "text, which narrows the interval"
                )
            else:
                low = middle + 1
        return best

    def point(self, name: str, model: ResNetBKForCausalLM, loss: float | None) -> dict[str, Any]:
        """A row of the frontier: a quantized model, and the loss that was predicted for it."""
        scores = self.judge(model)
        change = paired_change(self.reference, scores)
        assert model.receipt is not None
        return {
            "name": name,
            "average_bits": average_bits(model.receipt),
            "bytes": model.estimate_model_size()["current_bytes"],
            "ppl_token": perplexity_per_token(scores),
            "delta_pct": change.delta_pct,
            "ci_low_pct": change.low_pct,
            "ci_high_pct": change.high_pct,
            "predicted_pct": None if loss is None else _percent(loss),
        }

    def points(
        self, sizes: Sequence[float], on_progress: Callable[[float], None]
    ) -> list[dict[str, Any]]:
        """Rows along the frontier.

        Args:
            sizes: average bits of rivals, each of which gets a row that has at most as many. The
                others are evenly spaced in the logarithm of their size.
            on_progress: called with the fraction done.
        """
        ends = frontier(self.choices)
        low, high = (total_bytes(end) / self.bytes_a_bit for end in (ends[0], ends[-1]))
        inner = torch.logspace(math.log2(low), math.log2(high), _FRONTIER_POINTS, base=2)[1:-1]
        budgets = {low, high, *inner.tolist(), *(size for size in sizes if size > low)}
        rows = []
        for bits in sorted(budgets):
            assignment = self.within(bits)
            model = self.quantize(assignment)
            rows.append(self.point("budget", model, total_loss(assignment)))
            on_progress(len(rows) / len(budgets))
        return rows


def _percent(loss: float) -> float:
    """The change of perplexity that a change of loss is; infinite where float64 overflows."""
    return 100 * float(torch.tensor(loss, dtype=torch.float64).expm1())


def _bytes(choice: Choice) -> int:
    return choice.bytes


def sensitivity_table(found: Sequence[Sensitivity], assignment: Assignment) -> Table:
    """Units by what they lose at the narrowest width, the most sensitive first."""
    widths = sorted({entry.bits for entry in found})
    by_unit: dict[str, dict[int, Sensitivity]] = {}
    for entry in found:
        by_unit.setdefault(entry.unit, {})[entry.bits] = entry
    table = Table(
        title="sensitivity: what quantizing one unit alone does, millinats a token",
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
        rows: of `Search.point`; those named "budget" and "saved" make the line. What is not finite
            has no place in a picture, and is left out.
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
