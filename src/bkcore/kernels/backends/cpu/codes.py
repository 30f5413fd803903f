"""Operators with integer codes, and rounding to codes, on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from bkcore.kernels.backends.cpu import native
from bkcore.kernels.backends.cpu.sweep import chains, sizes, sweep
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
    SweepCodes,
    SweepRounded,
    ordered_sum,
)
from bkcore.kernels.backends.reference import codes as reference
from bkcore.kernels.layout import empty_parts


def sweep_codes(args: SweepCodes) -> Tensor:
    batch, sites, row = args.v.shape
    codes = args.v.new_empty(batch, sites, args.out_scale.shape[0], row)
    bounds = None if args.out_levels is None else reference.bounds_between(args.out_levels)
    native.call(
        "sweep_codes",
        two_sided=args.two_sided,
        bits=args.bits,
        v=native.buffer(args.v),
        source=native.buffer(args.source),
        in_levels=native.buffer(args.in_levels),
        **sizes(args.v, args.energy.shape[0]),
        **chains(args),
        codes=native.buffer(codes),
        in_scale=native.rows_of_parts(args.in_scale),
        in_zero=native.rows_of_parts(args.in_zero),
        out_scale=native.rows_of_parts(args.out_scale),
        out_zero=native.rows_of_parts(args.out_zero),
        out_bounds=native.buffer(bounds),
    )
    return codes


def sweep_rounded(args: SweepRounded) -> Tensor:
    batch, sites, lanes = args.v.shape
    if native.is_cut_into_blocks(batch * lanes, sites):
        return reference.sweep_rounded(args, sweep)
    parts = empty_parts(args.v, 2)
    bounds = None if args.levels is None else reference.bounds_between(args.levels)
    native.call(
        "sweep_rounded",
        two_sided=args.two_sided,
        bits=args.bits,
        group_size=args.group_size,
        scale=native.buffer(args.scale),
        zero=native.buffer(args.zero),
        levels=native.buffer(args.levels),
        **sizes(args.v),
        **chains(args),
        v=native.sequence(args.v),
        parts=native.sequence_of_parts(parts),
        bounds=native.buffer(bounds),
    )
    return parts


def product(args: Product) -> Tensor:
    x = args.x
    inputs, outputs = x.shape[-1], args.weight.shape[0]
    rows = x.numel() // inputs
    out = x.new_empty(*x.shape[:-1], outputs)
    native.call("product", args, rows=rows, inputs=inputs, outputs=outputs, out=native.buffer(out))
    return out


def _rows(x: Tensor) -> tuple[int, int]:
    """Rows and channels of x."""
    channels = x.shape[-1]
    return x.numel() // max(channels, 1), channels


def round_channels(args: RoundChannels) -> Tensor:
    out = torch.empty_like(args.x)
    rows, channels = _rows(out)
    native.call("round_channels", args, rows=rows, channels=channels, out=native.buffer(out))
    return out


def round_channels_backward(args: RoundChannelsBackward) -> RoundChannelsGradients:
    x, (rows, channels) = args.x, _rows(args.x)
    # Rows are summed in shares of fixed size, so that the sums do not depend on the threads.
    shares = -(-rows // native.rows_per_share())
    dx, dscale = torch.empty_like(x), x.new_zeros(shares, channels)
    dlevels = None if args.levels is None else x.new_zeros(shares, 2**args.bits)
    native.call(
        "round_channels_backward",
        args,
        rows=rows,
        channels=channels,
        dx=native.buffer(dx),
        dscale=native.buffer(dscale),
        dlevels=native.buffer(dlevels),
    )
    return RoundChannelsGradients(
        dx, ordered_sum(dscale), None if dlevels is None else ordered_sum(dlevels)
    )


def round_rows(args: RoundRows) -> Tensor:
    out = torch.empty_like(args.x)
    rows, channels = _rows(out)
    native.call("round_rows", args, rows=rows, channels=channels, out=native.buffer(out))
    return out


def round_weight(args: RoundWeight) -> RoundWeightResults:
    weight, (rows, columns) = args.weight, args.weight.shape
    results = RoundWeightResults(
        torch.empty_like(weight, dtype=torch.int8), torch.empty_like(weight)
    )
    native.call("round_weight", args, results, rows=rows, columns=columns)
    return results


def round_weight_backward(args: RoundWeightBackward) -> RoundWeightGradients:
    weight, (rows, columns) = args.weight, args.weight.shape
    grads = RoundWeightGradients(torch.empty_like(weight), weight.new_empty(args.scale.shape))
    results = {"dweight": native.buffer(grads.weight), "dscale": native.buffer(grads.scale)}
    native.call("round_weight_backward", args, rows=rows, columns=columns, **results)
    return grads
