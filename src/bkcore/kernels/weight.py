"""Rounding of a weight in training, as codes and values at once: `bkcore::round_weight`.

In one pass each way:

    code = clamp(round(w / scale), -128, 127),   value = scale * code         at 8 bits,

with ties to even. At 4 bits the codes that are given are the nearest to w / scale of the sixteen
levels of `bkcore.kernels.weight_levels`, the lower one halfway. NaN has a value of NaN, and some
code.

Layout
------
    weight  float32 (O, K)
    scale   bfloat16 (O, G), positive, of groups of `group_size` neighbouring columns; the last one
            may be smaller: G = ceil(K / group_size)
    result  codes int8 (O, K) and values float32 (O, K)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bkcore.errors import DTypeError, InputError, ShapeError
from bkcore.kernels.selection import select

_library = torch.library.Library("bkcore", "FRAGMENT")
_library.define(
    "round_weight(Tensor weight, Tensor scale, int group_size, int bits) -> (Tensor, Tensor)"
)
_library.define(
    "round_weight_backward(Tensor grad, Tensor weight, Tensor scale, int group_size, int bits)"
    " -> (Tensor, Tensor)"
)


def round_weight(
    weight: Tensor, scale: Tensor, group_size: int, bits: int
) -> tuple[Tensor, Tensor]:
    """Codes of a weight, and the values they stand for; layout and rounding as in the module.

    The values are differentiable: straight through in the weight, 0 where it lies beyond the codes,
    and in the scales by the gradient of learned step sizes (LSQ, Esser et al., ICLR 2020, eq. 3).

    Args:
        scale: float32 (O, G), numbers that bfloat16 holds.

    Returns:
        int8 (O, K) and float32 (O, K).

    Raises:
        ShapeError, DTypeError, InputError: the tensors do not fit together, or bits is not 4 or 8.
        BackendError: a forced backend is absent or cannot take the tensors.
    """
    codes, values = _RoundWeight.apply(weight, scale, group_size, bits)
    return codes, values


class _RoundWeight(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, scale: Tensor, group_size: int, bits: int
    ) -> tuple[Tensor, Tensor]:
        stored = scale.to(torch.bfloat16)
        ctx.save_for_backward(weight, stored)
        ctx.format = group_size, bits
        codes, values = torch.ops.bkcore.round_weight.default(weight, stored, group_size, bits)
        ctx.mark_non_differentiable(codes)
        return codes, values

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        by_weight, by_scale = torch.ops.bkcore.round_weight_backward.default(
            grads[1], *ctx.saved_tensors, *ctx.format
        )
        return by_weight, by_scale, None, None


def _check(weight: Tensor, scale: Tensor, group_size: int, bits: int) -> None:
    if bits not in (4, 8):
        raise InputError(f"bits must be 4 or 8, not {bits}")
    if group_size < 1:
        raise InputError(f"group_size must be at least 1, not {group_size}")
    if weight.ndim != 2:
        raise ShapeError(f"weight must be (O, K), got {tuple(weight.shape)}")
    rows, columns = weight.shape
    if scale.shape != (rows, -(-columns // group_size)):
        raise ShapeError(
            f"scale must be {(rows, -(-columns // group_size))} for a weight {(rows, columns)} in "
            f"groups of {group_size}, got {tuple(scale.shape)}"
        )
    for name, tensor, dtype in (
        ("weight", weight, torch.float32),
        ("scale", scale, torch.bfloat16),
    ):
        if tensor.dtype != dtype or tensor.device != weight.device:
            raise DTypeError(
                f"{name} must be {dtype} on {weight.device}, got {tensor.dtype} on {tensor.device}"
            )


def _round_weight(
    weight: Tensor, scale: Tensor, group_size: int, bits: int
) -> tuple[Tensor, Tensor]:
    _check(weight, scale, group_size, bits)
    return select(weight).round_weight(weight.contiguous(), scale.contiguous(), group_size, bits)


def _round_weight_fake(
    weight: Tensor, scale: Tensor, group_size: int, bits: int
) -> tuple[Tensor, Tensor]:
    _check(weight, scale, group_size, bits)
    return weight.new_empty(weight.shape, dtype=torch.int8), weight.new_empty(weight.shape)


def _round_weight_backward(
    grad: Tensor, weight: Tensor, scale: Tensor, group_size: int, bits: int
) -> tuple[Tensor, Tensor]:
    _check(weight, scale, group_size, bits)
    return select(weight).round_weight_backward(
        grad.contiguous(), weight.contiguous(), scale.contiguous(), group_size, bits
    )


def _round_weight_backward_fake(
    grad: Tensor, weight: Tensor, scale: Tensor, group_size: int, bits: int
) -> tuple[Tensor, Tensor]:
    return weight.new_empty(weight.shape), weight.new_empty(scale.shape)


_library.impl("round_weight", _round_weight, "CompositeExplicitAutograd")
_library.impl("round_weight_backward", _round_weight_backward, "CompositeExplicitAutograd")
torch.library.register_fake("bkcore::round_weight", _round_weight_fake, lib=_library)
torch.library.register_fake(
    "bkcore::round_weight_backward", _round_weight_backward_fake, lib=_library
)
