"""What the 4-bit codes of a weight stand for."""

from __future__ import annotations

import math

import torch

from bkcore.kernels.int4_levels import (
    INT4_LEVELS,
    nearest_codes,
    saturates,
    to_codes,
    to_levels,
)

EVERY = torch.arange(-8, 8, dtype=torch.int8)


def test_codes_and_levels_are_one_to_one():
    assert to_levels(EVERY).tolist() == list(INT4_LEVELS)
    assert torch.equal(to_codes(to_levels(EVERY)), EVERY)
    assert to_codes(to_levels(EVERY)).dtype == to_levels(EVERY).dtype == torch.int8


def test_levels_are_those_of_the_formula():
    """Its inverse, with an inverse hyperbolic sine, gives even steps to rounding of the levels."""
    assert (INT4_LEVELS[0], INT4_LEVELS[8], INT4_LEVELS[15]) == (-127, 0, 127)
    for code, level in zip(EVERY.tolist(), INT4_LEVELS, strict=True):
        steps = 8 if level < 0 else 7
        place = steps * math.asinh(level / 127 * math.sinh(1.6)) / 1.6
        # Half a unit of a level is at most this part of a step, next to 0 where steps are shortest.
        assert abs(place - code) <= steps * 0.5 / 127 * math.sinh(1.6) / 1.6


def test_a_level_is_nearest_to_itself_and_only_what_lies_outside_saturates():
    levels = to_levels(EVERY).float()
    assert torch.equal(nearest_codes(levels, 4), levels)
    assert not saturates(levels, 4).any()
    assert saturates(torch.tensor([127.01, -127.01, torch.inf]), 4).all()
    whole = torch.arange(-128, 128).float()
    assert torch.equal(nearest_codes(whole, 8), whole)
    assert not saturates(torch.tensor([127.4, -128.5]), 8).any()  # -128.5 is rounded to even
    assert saturates(torch.tensor([127.6, -128.6]), 8).all()
