"""Rounding to what codes stand for, channel by channel: the operator `bkcore::round_channels`.

It gives, bit for bit, what `bkcore.quantization.affine.fake_quantize` gives, in one pass:

    scale * (clamp(round(x / scale) + zero, -2^(bits-1), 2^(bits-1) - 1) - zero)

with ties to even. NaN stays NaN. It has no derivative.

Layout
------
    x       float32 (..., C), contiguous in memory or copied
    scale   bfloat16 (G,), zero  int8 (G,), of groups of `group_size` neighbouring channels; the
            last one may be smaller: G = ceil(C / group_size)
    result  float32 (..., C)
"""

from __future__ import annotations

import torch
from torch import Tensor

from bkcore.errors import DTypeError, InputError, ShapeError
from bkcore.kernels.selection import select

_library = torch.library.Library("bkcore", "FRAGMENT")
_library.define(
    "round_channels(Tensor x, Tensor scale, Tensor zero, int group_size, int bits) -> Tensor"
)


def round_channels(x: Tensor, scale: Tensor, zero: Tensor, group_size: int, bits: int) -> Tensor:
    """Round x to what codes stand for; layout and rounding are those of this module's text.

    Returns:
        float32, of the shape of x.

    Raises:
        ShapeError, DTypeError, InputError: the tensors do not fit together, or bits is not 4 or 8.
        BackendError: a forced backend is absent or cannot take the tensors.
    """
    out: Tensor = torch.ops.bkcore.round_channels.default(x, scale, zero, group_size, bits)
    return out


def _check(x: Tensor, scale: Tensor, zero: Tensor, group_size: int, bits: int) -> None:
    if bits not in (4, 8):
        raise InputError(f"bits must be 4 or 8, not {bits}")
    if group_size < 1:
        raise InputError(f"group_size must be at least 1, not {group_size}")
    if x.ndim < 1:
        raise ShapeError("x must have an axis of channels")
    groups = -(-x.shape[-1] // group_size)
    for name, tensor, dtype, shape in (
        ("x", x, torch.float32, x.shape),
        ("scale", scale, torch.bfloat16, (groups,)),
        ("zero", zero, torch.int8, (groups,)),
    ):
        if tensor.shape != shape:
            raise ShapeError(
                f"{name} must be {tuple(shape)} for {x.shape[-1]} channels in groups of "
                f"{group_size}, got {tuple(tensor.shape)}"
            )
        if tensor.dtype != dtype or tensor.device != x.device:
            raise DTypeError(
                f"{name} must be {dtype} on {x.device}, got {tensor.dtype} on {tensor.device}"
            )


def _round_channels(x: Tensor, scale: Tensor, zero: Tensor, group_size: int, bits: int) -> Tensor:
    _check(x, scale, zero, group_size, bits)
    x = x.contiguous()
    return select(x).round_channels(x, scale.contiguous(), zero.contiguous(), group_size, bits)


def _round_channels_fake(
    x: Tensor, scale: Tensor, zero: Tensor, group_size: int, bits: int
) -> Tensor:
    _check(x, scale, zero, group_size, bits)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


_library.impl("round_channels", _round_channels, "CompositeExplicitAutograd")
torch.library.register_fake("bkcore::round_channels", _round_channels_fake, lib=_library)
