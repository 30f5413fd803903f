"""Rounding to the values of codes: the operators `bkcore::round_channels` and `round_rows`.

In one pass, the first has bit for bit the result of `bkcore.quantization.affine.fake_quantize`:

    scale * (clamp(round(x / scale) + zero, -2^(bits-1), 2^(bits-1) - 1) - zero)

with ties to even. With levels it is scale * (level - zero) for the level nearest to
x / scale + zero, or the lower one if two are equally near. NaN stays NaN.

The second gives scale times codes of what `bkcore::product` makes of its activations, rows (..., K)
of float32, each with the INT8 scale of its largest number; see `bkcore.kernels.ops.product`. It has
no derivative. That of the first passes straight through to x, and not where x lies beyond the
outermost codes; that of a scale is the gradient of learned step sizes (LSQ, Esser et al., ICLR
2020, eq. 3).

Layout of `round_channels`
-------------------------
    x       float32 (..., C), contiguous in memory or copied
    scale   bfloat16 (G,), zero  int8 (G,), of groups of `group_size` neighbouring channels; the
            last one may be smaller: G = ceil(C / group_size); a group size beyond C is C.
            The operator takes float32 scales, too, of numbers that bfloat16 holds: a gradient of
            them is not rounded. Backends get bfloat16.
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
from bkcore.kernels.checks import check_bits, check_rounding, check_tensors
from bkcore.kernels.ops.contract import define, define_derivative


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
        BackendError: a forced backend is not available or cannot take the tensors.
    """
    check_tensors({"scale": (scale, scale.shape, torch.bfloat16)}, x.device)
    out: Tensor = torch.ops.bkcore.round_channels.default(x, scale, zero, levels, group_size, bits)
    return out


def round_rows(x: Tensor) -> Tensor:
    """Round every row of x (..., K) to INT8 with its own scale; see the top of this module.

    Returns:
        float32, of the shape of x.

    Raises:
        ShapeError, DTypeError: if x is not float32 (..., K) with K >= 1.
        BackendError: a forced backend is not available or cannot take the tensor.
    """
    out: Tensor = torch.ops.bkcore.round_rows.default(x)
    return out


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

    Args:
        scale: float32 (G,), with values that bfloat16 can hold. The others are as in
            `round_channels`.

    Returns:
        float32, of the shape of x.
    """
    check_tensors({"scale": (scale, scale.shape, torch.float32)}, x.device)
    out: Tensor = torch.ops.bkcore.round_channels.default(x, scale, zero, levels, group_size, bits)
    return out


def _check(args: RoundChannels, grad: Tensor | None = None) -> RoundChannels:
    x = args.x
    check_bits(args.bits)
    if x.ndim < 1:
        raise ShapeError("x must have an axis of channels")
    check_tensors(
        {"x": (x, x.shape, torch.float32), "grad": (grad, x.shape, torch.float32)}, x.device
    )
    scale = args.scale.to(torch.bfloat16) if args.scale.dtype == torch.float32 else args.scale
    group_size = check_rounding(x.shape[-1], x.device, scale, *args[2:])
    return RoundChannels(x, scale, args.zero, args.levels, group_size, args.bits)


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


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, group_size, bits = inputs
    ctx.save_for_backward(*tensors)
    ctx.form = group_size, bits


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # once: activation checkpointing gives them only once
    dx, dscale, dlevels = torch.ops.bkcore.round_channels_backward.default(grad, *saved, *ctx.form)
    return dx, dscale, None, None if saved[3] is None else dlevels, None, None


define("round_channels", RoundChannels, _check, _run, _like)
define(
    "round_channels_backward",
    RoundChannelsBackward,
    _check_backward,
    _run_backward,
    _like_backward,
    results=3,
)
define_derivative("round_channels", _setup_context, _backward)
define("round_rows", RoundRows, _check_rows, _run_rows, _like)
