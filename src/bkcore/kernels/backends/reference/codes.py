"""Operators with integer codes, and rounding to codes, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bkcore.kernels.backends.interface import (
    Product,
    RoundChannels,
    RoundChannelsBackward,
    RoundChannelsGradients,
    RoundRows,
    RoundWeight,
    RoundWeightBackward,
    RoundWeightGradients,
    RoundWeightResults,
    Sweep,
    SweepCodes,
    SweepRounded,
)
from bkcore.kernels.backends.reference.sweep import sweep
from bkcore.kernels.int4_levels import nearest_codes, saturates, to_levels
from bkcore.kernels.layout import empty_parts


def sweep_codes(args: SweepCodes) -> Tensor:
    bits, lanes, in_levels = args.bits, args.energy.shape[0], args.in_levels
    low = -(1 << (bits - 1))

    def decode(codes: Tensor, n: int) -> Tensor:
        unpacked = _bytes(codes, lanes, bits)
        level = unpacked if in_levels is None else in_levels[n][unpacked.long() - low]
        return args.in_scale[n] * (level - args.in_zero[n])

    v = decode(args.v, 0)
    source = None if args.source is None else decode(args.source, 1)
    parts = sweep(Sweep(v, source, args.energy, args.eta, args.hopping, args.two_sided))
    ratio, zero = parts / args.out_scale.transpose(0, 1), args.out_zero.transpose(0, 1)
    if args.out_levels is None:
        rounded = (torch.round(ratio) + zero).clamp(low, -low - 1)
    else:
        pairs = zip((ratio + zero).unbind(2), bounds_between(args.out_levels), strict=True)
        found = [
            torch.where(x.isnan(), 0, torch.bucketize(x.contiguous(), bounds))
            for x, bounds in pairs
        ]
        rounded = (torch.stack(found, 2) + low).float()
    codes = torch.nan_to_num(rounded, nan=low).to(torch.int8)
    if bits == 8:
        return codes
    nibbles = torch.nn.functional.pad(codes, (0, lanes % 2)).view(torch.uint8) & 0xF
    return nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)


def sweep_rounded(args: SweepRounded, sweep: Callable[[Sweep], Tensor] = sweep) -> Tensor:
    """Round, sweep with any backend's sweep, and round again."""
    bounds = None if args.levels is None else bounds_between(args.levels)

    def rounded(x: Tensor, part: int) -> Tensor:
        table = None if args.levels is None or bounds is None else (args.levels[part], bounds[part])
        return _round_sites(x, args.scale[part], args.zero[part], table, args)

    v = rounded(args.v, 0)
    parts = sweep(Sweep(v, None, args.energy, args.eta, args.hopping, args.two_sided))
    return empty_parts(args.v, 2).copy_(
        torch.stack([rounded(parts[:, :, c], 1 + c) for c in range(2)], 2)
    )


def _round_sites(
    x: Tensor,
    scale: Tensor,
    zero: Tensor,
    table: tuple[Tensor, Tensor] | None,
    args: SweepRounded,
) -> Tensor:
    """Round x (B, N, H) by the scales (G,) and zero points (G,) of its sites; the table holds the
    levels and the bounds between them."""
    half = 1 << (args.bits - 1)
    group = torch.arange(x.shape[1], device=x.device) // args.group_size
    step, offset = scale[group, None], zero[group, None]
    if table is None:
        level = (torch.round(x / step) + offset).clamp(-half, half - 1)
    else:
        levels, bounds = table
        place = torch.bucketize((x / step + offset).contiguous(), bounds)
        level = torch.where(x.isnan(), x, levels[place.clamp(max=2 * half - 1)])
    return step * (level - offset)


def bounds_between(levels: Tensor) -> Tensor:
    """Midpoints between levels (C, L): above bound i, a number is nearer to level i + 1."""
    between = levels[:, :-1] + (levels[:, 1:] - levels[:, :-1]) / 2
    return torch.nn.functional.pad(between, (0, 1), value=torch.inf)


def product(args: Product) -> Tensor:
    x, weight = args.x, args.weight
    codes, row_scale = quantize_rows(x.flatten(0, -2) if x.ndim > 1 else x[None])
    weight_codes = _bytes(weight, x.shape[-1], args.bits)
    if args.bits == 4:
        weight_codes = to_levels(weight_codes)
    scales = args.scales.float()
    out = integer_product(codes, row_scale, weight_codes, scales, args.group_size)
    return out.view(*x.shape[:-1], len(weight))


def round_channels(args: RoundChannels) -> Tensor:
    x, levels = args.x, args.levels
    s, z = _each_channel(args)
    if levels is not None:
        level = levels[torch.bucketize(x / s + z, levels[:-1] + levels.diff() / 2)]
        return torch.where(x.isnan(), x, s * (level - z))
    low = -(1 << (args.bits - 1))
    return s * (((x / s).round() + z).clamp(low, -low - 1) - z)


def round_channels_backward(args: RoundChannelsBackward) -> RoundChannelsGradients:
    grad, levels = args.grad, args.levels
    s, z = _each_channel(args)
    ratio, low = args.x / s, -(1 << (args.bits - 1))
    by_levels = None
    if levels is None:
        code = ratio.round() + z
        outside = (code < low) | (code > -low - 1)
        level = code.clamp(low, -low - 1)
    else:
        place = ratio + z
        index = torch.bucketize(place, levels[:-1] + levels.diff() / 2)
        index = torch.where(place.isnan(), 0, index)
        outside, level = (place < levels[0]) | (place > levels[-1]), levels[index]
        by_levels = torch.zeros_like(levels).index_add_(0, index.flatten(), (grad * s).flatten())
    moved = level - z - ratio.masked_fill(outside, 0)
    by_scale = (grad * moved).flatten(0, -2).sum(0)
    return RoundChannelsGradients(grad.masked_fill(outside, 0), by_scale, by_levels)


def _each_channel(args: RoundChannels | RoundChannelsBackward) -> tuple[Tensor, Tensor]:
    """Scale and zero point of every channel."""
    channels = torch.arange(args.x.shape[-1], device=args.x.device) // args.group_size
    return args.scale.float()[channels], args.zero[channels]


def round_weight(args: RoundWeight) -> RoundWeightResults:
    weight, each = args.weight, _each_column(args)
    codes = nearest_codes(weight / each, args.bits)
    values = torch.where(weight.isnan(), weight, each * codes)
    return RoundWeightResults(torch.nan_to_num(codes).to(torch.int8), values)


def round_weight_backward(args: RoundWeightBackward) -> RoundWeightGradients:
    ratio = args.weight / _each_column(args)
    outside = saturates(ratio, args.bits)
    moved = nearest_codes(ratio, args.bits) - ratio.masked_fill(outside, 0)
    padding = -args.weight.shape[1] % args.group_size
    by_scale = torch.nn.functional.pad(args.grad * moved, (0, padding))
    grouped = by_scale.unflatten(1, (-1, args.group_size))
    return RoundWeightGradients(args.grad.masked_fill(outside, 0), grouped.sum(-1))


def _each_column(args: RoundWeight | RoundWeightBackward) -> Tensor:
    """The scale of every column."""
    each = args.scale.float().repeat_interleave(args.group_size, 1)
    return each[:, : args.weight.shape[1]]


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """INT8 codes (M, K) and float32 scales (M, 1) of the rows of x, as in `bkcore::product`."""
    scale = x.abs().amax(-1, keepdim=True) / 127
    scale = torch.where(scale < torch.finfo(torch.float32).tiny, 1.0, scale)
    # The quotient is at most 127 up to rounding, so no clamp is needed.
    return torch.where(scale.isfinite(), x / scale, 0.0).round_().to(torch.int8), scale


def round_rows(args: RoundRows) -> Tensor:
    codes, scale = quantize_rows(args.x)
    return codes * scale


def integer_product(
    codes: Tensor, row_scale: Tensor, weight_codes: Tensor, weight_scales: Tensor, group_size: int
) -> Tensor:
    """Products of codes, rescaled with the roundings of `bkcore.kernels.ops.product` in order.

    Args:
        codes, row_scale: int8 (M, K) and float32 (M, 1), from `quantize_rows`.
        weight_codes, weight_scales: int8 (O, K) and float32 (O, G).
        group_size: inputs that share a weight scale.

    Returns:
        float32 (M, O).
    """
    if codes.shape[1] == 1:  # torch._int_mm reads beyond a matrix of one column (2.13)
        codes, weight_codes = (torch.nn.functional.pad(x, (0, 1)) for x in (codes, weight_codes))
    total: Tensor | None = None
    for group, scale in enumerate(weight_scales.unbind(1)):
        columns = slice(group * group_size, (group + 1) * group_size)
        sums = torch._int_mm(codes[:, columns], weight_codes[:, columns].t())
        term = sums * scale
        total = term if total is None else total.add_(term)
    assert total is not None
    return total.mul_(row_scale)


def _bytes(codes: Tensor, lanes: int, bits: int) -> Tensor:
    if bits == 8:
        return codes
    signed = codes.view(torch.int8)
    return torch.stack(((signed << 4) >> 4, signed >> 4), -1).flatten(-2)[..., :lanes]
