"""Spending a budget: what is chosen against every other choice."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bkcore.errors import InputError
from bkcore.quantization.budget import Choice, allocate, frontier, total_bytes, total_loss

WIDTHS = (4, 8, 16)


def unit(size: int, losses: list[float]) -> list[Choice]:
    return [Choice(bits, size * bits, loss) for bits, loss in zip(WIDTHS, losses, strict=True)]


units = st.lists(
    st.builds(
        unit,
        st.integers(1, 5),
        # Coarse, so that ties occur; not sorted, because what is measured need not fall.
        st.lists(st.integers(0, 8).map(float), min_size=3, max_size=3),
    ),
    min_size=1,
    max_size=4,
).map(lambda found: {f"unit {number}": widths for number, widths in enumerate(found)})


@given(units)
def test_no_assignment_beats_one_of_the_frontier(choices):
    everything = [
        (sum(choice.bytes for choice in combination), sum(choice.loss for choice in combination))
        for combination in product(*choices.values())
    ]
    for assignment in frontier(choices):
        size, loss = total_bytes(assignment), total_loss(assignment)
        assert not any(other <= size and lower < loss for other, lower in everything)
    assert total_loss(frontier(choices)[-1]) == min(loss for _, loss in everything)
    assert total_bytes(frontier(choices)[0]) == min(size for size, _ in everything)


@given(units, st.floats(0, 1))
def test_the_budget_is_kept_and_used(choices, part):
    ends = frontier(choices)
    low, high = total_bytes(ends[0]), total_bytes(ends[-1])
    budget = low + part * (high - low)
    taken = allocate(choices, budget)
    assert total_bytes(taken) <= budget
    within = [step for step in ends if total_bytes(step) <= budget]
    assert total_loss(taken) <= total_loss(within[-1])


def test_bytes_go_where_they_save_most():
    choices = {"deaf": unit(1, [0.1, 0.0, 0.0]), "keen": unit(1, [5.0, 1.0, 0.0])}
    taken = allocate(choices, 12)
    assert {name: choice.bits for name, choice in taken.items()} == {"deaf": 4, "keen": 8}


def test_a_budget_below_the_narrowest_is_refused():
    with pytest.raises(InputError, match="3 bytes is too small; the narrowest weights take 4"):
        allocate({"unit": unit(1, [2.0, 1.0, 0.0])}, 3)
