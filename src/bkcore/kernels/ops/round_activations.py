"""Rounding to the values of codes: the operators `bkcore::round_channels` and `round_rows`.

In one pass, the first has bit for bit the result of `bkcore.quantization.affine.fake_quantize`:

    scale * (clamp(round(x / scale) + zero, -2^(bits-1), 2^(bits-1) - 1) - zero)

with ties to even. With levels it is scale * (level - zero) for the level nearest to
x / scale + zero, or the lower one if two are equally near. NaN stays NaN.

The second rounds float32 rows (..., K) as `bkcore::product` rounds its activations, and returns
scale times codes, each row with the INT8 scale of its largest number; see
`bkcore.kernels.ops.product`. The first has a derivative in `round_channels_straight_through`, the
second has none.

Layout of `round_channels`
-------------------------
    x       float32 (..., C), contiguous in memory or copied
    scale   bfloat16 (G,), zero  int8 (G,), of groups of `group_size` neighbouring channels; the
            last one may be smaller: G = ceil(C / group_size); a group size above C means C
    levels  float32 (2^bits,), ascending: what the codes stand for in place of
            -2^(bits-1), ..., 2^(bits-1) - 1; optional
    result  float32 (..., C)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bkcore.errors import ShapeError
from bkcore.kernels.backends.interface import (
    Backend,
    RoundChannels,
    RoundChannelsBackward,
    RoundRows,
)
from bkcore.kernels.backends.selection import keep_choice, kept_choice
from bkcore.kernels.checks import check_bits, check_rounding, check_tensors
from bkcore.kernels.ops.contract import define


def round_channels(
    x: Tensor,
    scale: Tensor,
    zero: Tensor,
    group_size: int,
    bits: int,
    *,
    levels: Tensor | None = None,
) -> Tensor:
    """Round x to the values of codes; layout and rounding are at the top of this module.

    Returns:
        float32, of the shape of x.

    Raises:
        ShapeError, DTypeError, InputError: the tensors do not fit together, or bits is not 4 or 8.
        BackendError: a forced backend is absent or cannot take the tensors.
    """
    out: Tensor = torch.ops.bkcore.round_channels.default(x, scale, zero, levels, group_size, bits)
    return out


def round_rows(x: Tensor) -> Tensor:
    """Round every row of x (..., K) to INT8 with its own scale; see the top of this module.

    Returns:
        float32, of the shape of x.

    Raises:
        ShapeError, DTypeError: if x is not float32 (..., K) with K >= 1.
        BackendError: a forced backend is absent or cannot take the tensor.
    """
    out: Tensor = torch.ops.bkcore.round_rows.default(x)
    return out


class _RoundChannels(torch.autograd.Function):
    """`round_channels` with float32 scales, straight through."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: Tensor,
        zero: Tensor,
        levels: Tensor | None,
        group_size: int,
        bits: int,
    ) -> Tensor:
        wanted = {"x": (x, x.shape, torch.float32), "scale": (scale, scale.shape, torch.float32)}
        check_tensors(wanted, x.device)
        x, stored = x.contiguous(), scale.to(torch.bfloat16)
        keep_choice(ctx)
        ctx.save_for_backward(x, stored, zero, levels)
        ctx.group_size, ctx.bits = group_size, bits
        return round_channels(x, stored, zero, group_size, bits, levels=levels)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, stored, zero, levels = ctx.saved_tensors
        with kept_choice(ctx):
            dx, dscale, dlevels = torch.ops.bkcore.round_channels_backward.default(
                grads[0], x, stored, zero, levels, ctx.group_size, ctx.bits
            )
        return dx, dscale, None, None if levels is None else dlevels, None, None


def round_channels_straight_through(
    x: Tensor,
    scale: Tensor,
    zero: Tensor,
    group_size: int,
    bits: int,
    *,
    levels: Tensor | None = None,
) -> Tensor:
    """`round_channels` for training: differentiable in x, the scales and the levels.

    The gradient passes straight through to x, except where x lies outside the outermost codes. The
    gradient of a scale is that of learned step sizes (LSQ, Esser et al., ICLR 2020, eq. 3).

    Args:
        scale: float32 (G,), with values that bfloat16 can hold. The others are as in
            `round_channels`.

    Returns:
        float32, of the shape of x.
    """
    out: Tensor = _RoundChannels.apply(x, scale, zero, levels, group_size, bits)
    return out


def _check(args: RoundChannels, grad: Tensor | None = None) -> RoundChannels:
    x = args.x
    check_bits(args.bits)
    if x.ndim < 1:
        raise ShapeError("x must have an axis of channels")
    check_tensors(
        {"x": (x, x.shape, torch.float32), "grad": (grad, x.shape, torch.float32)}, x.device
    )
    group_size = check_rounding(x.shape[-1], x.device, *args[1:])
    return RoundChannels(*args[:4], group_size, args.bits)


def _check_backward(args: RoundChannelsBackward) -> RoundChannelsBackward:
    return RoundChannelsBackward(args.grad, *_check(RoundChannels(*args[1:]), args.grad))


def _check_rows(args: RoundRows) -> RoundRows:
    x = args.x
    if x.ndim < 1 or x.shape[-1] < 1:
        raise ShapeError(f"x must be (..., K) with K >= 1, not {tuple(x.shape)}")
    check_tensors({"x": (x, x.shape, torch.float32)}, x.device)
    return args


def _contiguous(args: RoundChannels) -> RoundChannels:
    x, scale, zero, levels, group_size, bits = args
    levels = None if levels is None else levels.contiguous()
    x, scale, zero = x.contiguous(), scale.contiguous(), zero.contiguous()
    return RoundChannels(x, scale, zero, levels, group_size, bits)


def _run(backend: Backend, args: RoundChannels) -> Tensor:
    return backend.round_channels(_contiguous(args))


def _run_backward(backend: Backend, args: RoundChannelsBackward) -> tuple[Tensor, Tensor, Tensor]:
    forward = _contiguous(RoundChannels(*args[1:]))
    ready = RoundChannelsBackward(args.grad.contiguous(), *forward)
    dx, each, dlevels = backend.round_channels_backward(ready)
    padded = torch.nn.functional.pad(each, (0, -each.shape[0] % args.group_size))
    dscale = padded.view(-1, args.group_size).sum(1)
    return dx, dscale, args.x.new_empty(0) if dlevels is None else dlevels


def _run_rows(backend: Backend, args: RoundRows) -> Tensor:
    return backend.round_rows(RoundRows(args.x.contiguous()))


def _like(args: RoundChannels | RoundRows) -> Tensor:
    return torch.empty_like(args.x, memory_format=torch.contiguous_format)


def _like_backward(args: RoundChannelsBackward) -> tuple[Tensor, Tensor, Tensor]:
    dx = torch.empty_like(args.x, memory_format=torch.contiguous_format)
    levels = 0 if args.levels is None else len(args.levels)
    return dx, args.x.new_empty(args.scale.shape), args.x.new_empty(levels)


define("round_channels", RoundChannels, _check, _run, _like)
define(
    "round_channels_backward",
    RoundChannelsBackward,
    _check_backward,
    _run_backward,
    _like_backward,
    results=3,
)
define("round_rows", RoundRows, _check_rows, _run_rows, _like)
