"""Bit budgets: which weights get how many bits, what that costs, and how the modes compare.

Nothing here looks at the validation split. Sensitivities come from calibration windows, and choices
by perplexity are made on other windows of the training text.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bkcore.errors import InputError
from bkcore.evaluation.evaluate import Scorer
from bkcore.evaluation.perplexity import paired_change, perplexity_per_token
from bkcore.evaluation.sensitivity import Sensitivity, units
from bkcore.model import ResNetBKForCausalLM
from bkcore.model.conversion import quantizable, storage_bytes
from bkcore.quantization.budget import (
    Assignment,
    Choice,
    allocate,
    average_bits,
    frontier,
    total_bytes,
    total_loss,
)
from bkcore.quantization.config import QuantizationConfig
from bkcore.quantization.weights import PackedWeight

_FRONTIER_POINTS = 7
_HALF = 16


def check_target(model: ResNetBKForCausalLM, target_bits: float, group_size: int) -> None:
    """Raise `InputError` if no assignment averages so few bits per weight, including scales."""
    shapes = [tuple(slot.layer.weight.shape) for slot in quantizable(model)]
    smallest = sum(_narrowest(rows, columns, group_size) for rows, columns in shapes)
    least = 8 * smallest / sum(rows * columns for rows, columns in shapes)
    if target_bits < least:
        raise InputError(
            f"{target_bits:g} bits per weight cannot be reached; at groups of {group_size}, the "
            f"narrowest weights take {least:.3f} bits including scales; allow more bits, or share "
            "scales among more weights"
        )


def _narrowest(rows: int, columns: int, group_size: int) -> int:
    """Bytes of a weight at its cheapest width; the scales of small groups may outweigh codes."""
    with torch.device("meta"):
        packed = [
            PackedWeight((rows, columns), 4, min(group_size, columns)),
            PackedWeight((rows, columns), 8, columns),
        ]
    return min(2 * rows * columns, *map(storage_bytes, packed))


def calibrate_for_any_width(
    model: ResNetBKForCausalLM, config: QuantizationConfig, batches: Iterable[Tensor]
) -> None:
    """Calibrate a float model so that any weight may become INT4; it still computes in float.

    Args:
        model: float; afterwards ready for `apply_ptq`.
        config: without bits of individual weights.
        batches: token ids (B, N).
    """
    every = {name: 4 for names in units(model).values() for name in names}
    model.configure_quantization(replace(config, tensor_bits=every))
    model.start_calibration()
    with torch.no_grad():
        for batch in batches:
            model(batch)
    model.end_calibration()


class Search:
    """Assignments of bits to the units of one calibrated model.

    Args:
        calibrated: ready for `apply_ptq`; not changed.
        found: the sensitivities of all its units.
        scorer: scores on held-out text.
    """

    def __init__(
        self, calibrated: ResNetBKForCausalLM, found: Sequence[Sensitivity], scorer: Scorer
    ) -> None:
        self.calibrated = calibrated
        self.scorer = scorer
        self.choices = _choices(calibrated, found)
        widest = {unit: max(widths, key=_bytes) for unit, widths in self.choices.items()}
        self.bytes_a_bit = sum(choice.bytes / choice.bits for choice in widest.values())
        self.reference = scorer(calibrated)  # its forward passes are still float

    def within(self, bits: float) -> Assignment:
        """The best assignment with at most this many bits per weight on average, with scales.

        Raises:
            InputError: if even the narrowest widths need more.
        """
        # Sizes are whole bytes; rounding must not push a bound below the size it equals.
        return allocate(self.choices, bits * self.bytes_a_bit + 1e-3)

    def quantize(self, assignment: Assignment) -> ResNetBKForCausalLM:
        """The model with these bits."""
        model = copy.deepcopy(self.calibrated)
        bits = {unit: choice.bits for unit, choice in assignment.items()}
        model.assign_bits(_tensor_bits(model, bits))
        model.apply_ptq()
        return model

    def smallest_within(
        self, max_increase: float, on_progress: Callable[[float], None]
    ) -> tuple[ResNetBKForCausalLM, Assignment]:
        """The smallest model on the frontier whose perplexity rises by at most this many percent.

        The upper end of the 95 % interval of the measured increase is what counts. The search is a
        bisection, which assumes that the increase falls along the frontier.

        Raises:
            InputError: if even the last model on the frontier exceeds it.
        """
        assignments = frontier(self.choices)
        low, high, best = 0, len(assignments) - 1, None
        rounds, done = math.ceil(math.log2(len(assignments) + 1)), 0
        while best is None or low < high:
            middle = high if best is None else (low + high) // 2
            model = self.quantize(assignments[middle])
            change = paired_change(self.reference, self.scorer(model))
            done += 1
            on_progress(min(1.0, done / (rounds + 1)))
            if change.high_pct <= max_increase:
                high, best = middle, (model, assignments[middle])
            elif best is None:
                raise InputError(
                    f"perplexity rises by up to {change.high_pct:.3f} % even if every weight has "
                    f"the width of least loss; allow more than {max_increase} %, or give more "
                    "text, which narrows the interval"
                )
            else:
                low = middle + 1
        return best

    def point(self, name: str, model: ResNetBKForCausalLM, loss: float | None) -> dict[str, Any]:
        """A row of the frontier: a quantized model, with the loss predicted for it."""
        scores = self.scorer(model)
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
            sizes: average bits of rival models; each gets a row with at most as many. The other
                rows are evenly spaced in the logarithm of their size.
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
    """A change of loss as a change of perplexity in percent; infinite if float64 overflows."""
    return 100 * float(torch.tensor(loss, dtype=torch.float64).expm1())


def _bytes(choice: Choice) -> int:
    return choice.bytes


def _choices(model: ResNetBKForCausalLM, found: Sequence[Sensitivity]) -> dict[str, list[Choice]]:
    """Widths of each unit with their bytes and divergences; float16 is taken as exact."""
    sizes = {slot.name: slot.layer.weight.numel() for slot in quantizable(model)}
    widths = {
        unit: [Choice(_HALF, 2 * sum(sizes[name] for name in names), 0.0)]
        for unit, names in units(model).items()
    }
    for entry in found:
        widths[entry.unit].append(Choice(entry.bits, entry.bytes, entry.divergence))
    return widths


def _tensor_bits(model: ResNetBKForCausalLM, unit_bits: dict[str, int]) -> dict[str, int]:
    """Turn bits of units into bits of their weights, for `QuantizationConfig.tensor_bits`."""
    return {name: unit_bits[unit] for unit, names in units(model).items() for name in names}
