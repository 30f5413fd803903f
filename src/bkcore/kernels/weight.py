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
            may be smaller: G = ceil(K / group_size); a group size beyond K is K
    result  codes int8 (O, K) and values float32 (O, K)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bkcore.errors import ShapeError
from bkcore.kernels.checks import check_bits, check_tensors, count_groups, fit_group_size
from bkcore.kernels.selection import keep_choice, kept_choice, select

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
        check_tensors({"scale": (scale, scale.shape, torch.float32)}, weight.device)
        stored = scale.to(torch.bfloat16)
        keep_choice(ctx)
        ctx.save_for_backward(weight, stored)
        ctx.format = group_size, bits
        codes, values = torch.ops.bkcore.round_weight.default(weight, stored, group_size, bits)
        ctx.mark_non_differentiable(codes)
        return codes, values

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        with kept_choice(ctx):
            by_weight, by_scale = torch.ops.bkcore.round_weight_backward.default(
                grads[1], *ctx.saved_tensors, *ctx.format
            )
        return by_weight, by_scale, None, None


def _check(
    weight: Tensor, scale: Tensor, group_size: int, bits: int, grad: Tensor | None = None
) -> int:
    """Raise if the arguments do not fit together; the group size that fits the columns."""
    check_bits(bits)
    if weight.ndim != 2:
        raise ShapeError(f"weight must be (O, K), got {tuple(weight.shape)}")
    rows, columns = weight.shape
    group_size = fit_group_size(group_size, columns)
    check_tensors(
        {
            "weight": (weight, weight.shape, torch.float32),
            "scale": (scale, (rows, count_groups(columns, group_size)), torch.bfloat16),
            "grad": (grad, weight.shape, torch.float32),
        },
        weight.device,
        lambda: f"for a weight {(rows, columns)} in groups of {group_size}",
    )
    return group_size


def _round_weight(
    weight: Tensor, scale: Tensor, group_size: int, bits: int
) -> tuple[Tensor, Tensor]:
    group_size = _check(weight, scale, group_size, bits)
    return select(weight).round_weight(weight.contiguous(), scale.contiguous(), group_size, bits)


def _round_weight_fake(
    weight: Tensor, scale: Tensor, group_size: int, bits: int
) -> tuple[Tensor, Tensor]:
    _check(weight, scale, group_size, bits)
    return weight.new_empty(weight.shape, dtype=torch.int8), weight.new_empty(weight.shape)


def _round_weight_backward(
    grad: Tensor, weight: Tensor, scale: Tensor, group_size: int, bits: int
) -> tuple[Tensor, Tensor]:
    group_size = _check(weight, scale, group_size, bits, grad)
    return select(weight).round_weight_backward(
        grad.contiguous(), weight.contiguous(), scale.contiguous(), group_size, bits
    )


def _round_weight_backward_fake(
    grad: Tensor, weight: Tensor, scale: Tensor, group_size: int, bits: int
) -> tuple[Tensor, Tensor]:
    _check(weight, scale, group_size, bits, grad)
    return weight.new_empty(weight.shape), weight.new_empty(scale.shape)


_library.impl("round_weight", _round_weight, "CompositeExplicitAutograd")
_library.impl("round_weight_backward", _round_weight_backward, "CompositeExplicitAutograd")
torch.library.register_fake("bkcore::round_weight", _round_weight_fake, lib=_library)
torch.library.register_fake(
    "bkcore::round_weight_backward", _round_weight_backward_fake, lib=_library
)
