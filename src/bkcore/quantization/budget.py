"""Bit allocation: spend a budget of bytes on the weights where more bits lower the loss most.

Every unit (a weight, or the weights of an expert) has several possible widths, each with a size in
bytes and a loss; losses are taken to add up. A width above the line between a narrower and a wider
one is never worth its bytes, so only the lower convex hull is kept. Along the hulls, upgrades are
bought in order of the loss saved per byte. Each prefix of that order is the best assignment of its
size (Shoham and Gersho, "Efficient bit allocation for an arbitrary set of quantizers", 1988). If
the budget lies between two prefixes, later upgrades that still fit are bought too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from bkcore.errors import InputError


@dataclass(frozen=True)
class Choice:
    """One width of a unit: its bits, its bytes including scales, and its loss."""

    bits: int
    bytes: int
    loss: float


Assignment = dict[str, Choice]
"""The choice of each unit."""


def frontier(choices: Mapping[str, Sequence[Choice]]) -> list[Assignment]:
    """The best assignments, from the smallest model to the one with the least loss.

    Args:
        choices: the widths of each unit, at least one, in any order.
    """
    hulls = {unit: _hull(widths) for unit, widths in choices.items()}
    assignments = [{unit: hull[0] for unit, hull in hulls.items()}]
    for unit, choice in _upgrades(hulls):
        assignments.append(assignments[-1] | {unit: choice})
    return assignments


def allocate(choices: Mapping[str, Sequence[Choice]], budget: float) -> Assignment:
    """The widths to choose, together at most `budget` bytes.

    Args:
        choices: as in `frontier`.

    Raises:
        InputError: if the narrowest widths exceed the budget.
    """
    hulls = {unit: _hull(widths) for unit, widths in choices.items()}
    taken = {unit: hull[0] for unit, hull in hulls.items()}
    left = budget - total_bytes(taken)
    if left < 0:
        raise InputError(
            f"the budget of {budget:,.0f} bytes is too small; the narrowest weights take "
            f"{total_bytes(taken):,}; allow more bits, or share scales among more weights"
        )
    full = set()
    for unit, choice in _upgrades(hulls):
        price = choice.bytes - taken[unit].bytes
        if unit in full or price > left:
            full.add(unit)  # its next upgrade builds on this one
            continue
        taken[unit] = choice
        left -= price
    return taken


def total_bytes(assignment: Assignment) -> int:
    """Bytes of all units."""
    return sum(choice.bytes for choice in assignment.values())


def total_loss(assignment: Assignment) -> float:
    """Loss of all units, assuming that their losses add up."""
    return sum(choice.loss for choice in assignment.values())


def _hull(widths: Sequence[Choice]) -> list[Choice]:
    """Widths on the lower convex hull of loss over bytes, by rising bytes and falling loss."""
    hull: list[Choice] = []
    for choice in sorted(widths, key=lambda width: (width.bytes, width.loss)):
        if hull and choice.loss >= hull[-1].loss:
            continue
        while len(hull) > 1 and _saving(hull[-2], hull[-1]) <= _saving(hull[-1], choice):
            hull.pop()
        hull.append(choice)
    return hull


def _upgrades(hulls: Mapping[str, list[Choice]]) -> list[tuple[str, Choice]]:
    """Steps to a unit's next width, those that save the most loss per byte first."""
    steps = [
        (unit, wider, _saving(narrower, wider))
        for unit, hull in hulls.items()
        for narrower, wider in pairwise(hull)
    ]
    steps.sort(key=lambda step: -step[2])  # stable: a unit's steps stay in order
    return [(unit, wider) for unit, wider, _ in steps]


def _saving(narrower: Choice, wider: Choice) -> float:
    return (narrower.loss - wider.loss) / (wider.bytes - narrower.bytes)


def average_bits(receipt: Mapping[str, Any]) -> float:
    """Average bits per weight, including scales, over all weights that the mode quantizes.

    Args:
        receipt: see `bkcore.model.receipt.of_quantized`.
    """
    weights = receipt["weights"]
    count = sum(rows * columns for rows, columns in (entry["shape"] for entry in weights))
    return float(8 * sum(entry["bytes"] for entry in weights) / count)
