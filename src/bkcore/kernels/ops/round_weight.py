"""Rounding of a weight in training, as codes and values at once: `bkcore::round_weight`.

In one pass each way:

    code = clamp(round(w / scale), -128, 127),   value = scale * code         at 8 bits,

with ties to even. At 4 bits, the returned codes are those of the sixteen levels of
`bkcore.kernels.int4_levels` that are nearest to w / scale, the lower one if two are equally near.
NaN gets the value NaN and an arbitrary code.

Layout
------
    weight  float32 (O, K)
    scale   float32 (O, G), positive numbers that bfloat16 holds, so that a gradient of them is not
            rounded, of groups of `group_size` neighbouring columns; the last one may be smaller:
            G = ceil(K / group_size); a group size beyond K is K. Backends get it as bfloat16.
    result  codes int8 (O, K) and values float32 (O, K)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bkcore.errors import ShapeError
from bkcore.kernels.backends.interface import (
    Backend,
    RoundWeight,
    RoundWeightBackward,
    RoundWeightGradients,
    RoundWeightResults,
)
from bkcore.kernels.checks import check_bits, check_tensors, count_groups, fit_group_size
from bkcore.kernels.ops.contract import define, define_derivative


def round_weight(
    weight: Tensor, scale: Tensor, group_size: int, bits: int
) -> tuple[Tensor, Tensor]:
    """Codes of a weight, and the values they stand for; layout and rounding as in the module.

    The values are differentiable: straight through in the weight, with 0 outside the range of the
    codes, and by the gradient of learned step sizes in the scales (LSQ, Esser et al., ICLR 2020,
    eq. 3).

    Args:
        scale: float32 (O, G), with values that bfloat16 can hold.

    Returns:
        int8 (O, K) and float32 (O, K).

    Raises:
        ShapeError, DTypeError, InputError: the tensors do not fit together, or bits is not 4 or 8.
        BackendError: a forced backend is not available or cannot take the tensors.
    """
    codes, values = torch.ops.bkcore.round_weight.default(weight, scale, group_size, bits)
    return codes, values


def _check(args: RoundWeight, grad: Tensor | None = None) -> RoundWeight:
    weight = args.weight
    check_bits(args.bits)
    if weight.ndim != 2:
        raise ShapeError(f"weight must be (O, K), not {tuple(weight.shape)}")
    rows, columns = weight.shape
    group_size = fit_group_size(args.group_size, columns)
    check_tensors(
        {
            "weight": (weight, weight.shape, torch.float32),
            "scale": (args.scale, (rows, count_groups(columns, group_size)), torch.float32),
            "grad": (grad, weight.shape, torch.float32),
        },
        weight.device,
        lambda: f"for a weight {(rows, columns)} in groups of {group_size}",
    )
    return RoundWeight(weight, args.scale, group_size, args.bits)


def _check_backward(args: RoundWeightBackward) -> RoundWeightBackward:
    return RoundWeightBackward(args.grad, *_check(RoundWeight(*args[1:]), args.grad))


def _ready(weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    return weight.contiguous(), scale.to(torch.bfloat16).contiguous()


def _run(backend: Backend, args: RoundWeight) -> RoundWeightResults:
    weight, scale, *form = args
    return backend.round_weight(RoundWeight(*_ready(weight, scale), *form))


def _run_backward(backend: Backend, args: RoundWeightBackward) -> RoundWeightGradients:
    grad, weight, scale, *form = args
    ready = RoundWeightBackward(grad.contiguous(), *_ready(weight, scale), *form)
    return backend.round_weight_backward(ready)


def _like(args: RoundWeight) -> RoundWeightResults:
    shape = args.weight.shape
    codes = args.weight.new_empty(shape, dtype=torch.int8)
    return RoundWeightResults(codes, args.weight.new_empty(shape))


def _like_backward(args: RoundWeightBackward) -> RoundWeightGradients:
    like = args.weight, args.scale
    return RoundWeightGradients(*(x.new_empty(x.shape) for x in like))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    weight, scale, *ctx.form = inputs
    ctx.mark_non_differentiable(output[0])
    ctx.save_for_backward(weight, scale)


def _backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    by_weight, by_scale = torch.ops.bkcore.round_weight_backward.default(
        grads[1], *ctx.saved_tensors, *ctx.form
    )
    return by_weight, by_scale, None, None


define("round_weight", RoundWeight, _check, _run, _like, results=2)
define(
    "round_weight_backward",
    RoundWeightBackward,
    _check_backward,
    _run_backward,
    _like_backward,
    results=2,
)
define_derivative("round_weight", _setup_context, _backward)
