"""The levels of a weight's 4-bit codes: sixteen unevenly spaced 8-bit integers.

Weights that share a scale have a heavy-tailed density: most are small, and a few set the scale. So
the levels are dense near 0 and sparse further out. A code c, -8 to 7, stands for

    level(c) = round(127 sinh(a c / n) / sinh(a)),    n = 8 below 0 and 7 above,    a = 1.6,

times its scale: companding by an inverse hyperbolic sine (for companded quantizers: Gersho and
Gray, "Vector Quantization and Signal Compression", 1992, section 5.6). The ends are +-127, so
products with INT8 activations are the same as for an INT8 weight. `docs/lab-notes.md` tells how `a`
was chosen and what even levels would cost.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

_COMPANDING = 1.6


def _level(code: int) -> int:
    part = code / (8 if code < 0 else 7)
    return round(127 * math.sinh(_COMPANDING * part) / math.sinh(_COMPANDING))


INT4_LEVELS = tuple(_level(code) for code in range(-8, 8))
"""Levels of the codes -8 to 7, ascending, from -127 to 127."""


_LEVELS = torch.tensor(INT4_LEVELS, dtype=torch.int8)


def levels(device: torch.device) -> Tensor:
    """`INT4_LEVELS` as int8 (16,) on a device; do not modify it."""
    return _LEVELS if device.type == "cpu" else _copy(device)


@functools.cache
def _copy(device: torch.device) -> Tensor:
    return _LEVELS.to(device)


def nearest_codes(x: Tensor, bits: int) -> Tensor:
    """The values of a weight's codes nearest to x: integers at 8 bits, levels at 4.

    Ties go to the even integer, or to the lower level.

    Returns:
        float32 in [-128, 127], of the shape of x. NaN stays NaN at 8 bits, and gives some level at
        4.
    """
    if bits == 8:
        return x.round().clamp(-128, 127)
    table = levels(x.device).float()
    return table[torch.bucketize(x, (table[:-1] + table[1:]) / 2)]


def saturates(x: Tensor, bits: int) -> Tensor:
    """Which numbers lie outside the range of the codes; bool, of the shape of x."""
    if bits == 8:
        return (x.round() < -128) | (x.round() > 127)
    return x.abs() > INT4_LEVELS[-1]


def to_codes(chosen: Tensor) -> Tensor:
    """The codes int8, -8 to 7, of levels int8 of the same shape."""
    return (torch.bucketize(chosen, levels(chosen.device)) - 8).to(torch.int8)


def to_levels(codes: Tensor) -> Tensor:
    """The levels int8 of codes int8, -8 to 7, of the same shape."""
    return levels(codes.device)[codes.int() + 8]
