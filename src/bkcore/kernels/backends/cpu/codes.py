"""What is computed from codes and rounded to codes on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from bkcore.kernels.backends.cpu import native
from bkcore.kernels.backends.cpu.sweep import chains, sizes, sweep
from bkcore.kernels.backends.interface import (
    Product,
    RoundChannels,
    RoundChannelsBackward,
    RoundRows,
    RoundWeight,
    RoundWeightBackward,
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
        bits=args.bits,
        **sizes(args.v, args.energy.shape[0]),
        **chains(args),
        in_scale=native.rows_of_parts(args.in_scale),
        in_zero=native.rows_of_parts(args.in_zero),
        out_scale=native.rows_of_parts(args.out_scale),
        out_zero=native.rows_of_parts(args.out_zero),
        **native.buffers(
            v=args.v,
            source=args.source,
            codes=codes,
            in_levels=args.in_levels,
            out_bounds=bounds,
        ),
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
        bits=args.bits,
        group_size=args.group_size,
        **sizes(args.v),
        **chains(args),
        v=native.sequence(args.v),
        parts=native.sequence_of_parts(parts),
        **native.buffers(scale=args.scale, zero=args.zero, levels=args.levels, bounds=bounds),
    )
    return parts


def product(args: Product) -> Tensor:
    x, weight = args.x, args.weight
    inputs, outputs = x.shape[-1], weight.shape[0]
    out = x.new_empty(*x.shape[:-1], outputs)
    native.call(
        "product",
        bits=args.bits,
        group_size=args.group_size,
        rows=x.numel() // inputs,
        inputs=inputs,
        outputs=outputs,
        **native.buffers(x=x, weight=weight, scales=args.scales, out=out),
    )
    return out


def _rows(x: Tensor) -> int:
    return x.numel() // max(x.shape[-1], 1)


def round_channels(args: RoundChannels) -> Tensor:
    out = torch.empty_like(args.x)
    native.call(
        "round_channels",
        bits=args.bits,
        group_size=args.group_size,
        rows=_rows(out),
        channels=out.shape[-1],
        **native.buffers(x=args.x, scale=args.scale, zero=args.zero, levels=args.levels, out=out),
    )
    return out


def round_channels_backward(
    args: RoundChannelsBackward,
) -> tuple[Tensor, Tensor, Tensor | None]:
    x, channels, rows = args.x, args.x.shape[-1], _rows(args.x)
    # Sums over rows are taken in shares of fixed size, so that they do not depend on the threads.
    shares = -(-rows // native.rows_per_share())
    dx, dscale = torch.empty_like(x), x.new_zeros(shares, channels)
    dlevels = None if args.levels is None else x.new_zeros(shares, 2**args.bits)
    native.call(
        "round_channels_backward",
        bits=args.bits,
        group_size=args.group_size,
        rows=rows,
        channels=channels,
        **native.buffers(grad=args.grad, x=x, scale=args.scale, zero=args.zero, levels=args.levels),
        **native.buffers(dx=dx, dscale=dscale, dlevels=dlevels),
    )
    return dx, ordered_sum(dscale), None if dlevels is None else ordered_sum(dlevels)


def round_rows(args: RoundRows) -> Tensor:
    out = torch.empty_like(args.x)
    columns = out.shape[-1]
    native.call(
        "round_rows",
        rows=out.numel() // columns,
        columns=columns,
        **native.buffers(x=args.x, out=out),
    )
    return out


def _weight_sizes(args: RoundWeight | RoundWeightBackward) -> dict[str, int]:
    rows, columns = args.weight.shape
    group_size, bits = args.group_size, args.bits
    return {"rows": rows, "columns": columns, "group_size": group_size, "bits": bits}


def round_weight(args: RoundWeight) -> tuple[Tensor, Tensor]:
    weight = args.weight
    codes, values = torch.empty_like(weight, dtype=torch.int8), torch.empty_like(weight)
    native.call(
        "round_weight",
        **_weight_sizes(args),
        **native.buffers(weight=weight, scale=args.scale, codes=codes, values=values),
    )
    return codes, values


def round_weight_backward(args: RoundWeightBackward) -> tuple[Tensor, Tensor]:
    weight, scale = args.weight, args.scale
    dweight, dscale = torch.empty_like(weight), weight.new_empty(scale.shape)
    native.call(
        "round_weight_backward",
        **_weight_sizes(args),
        **native.buffers(weight=weight, scale=scale, grad=args.grad),
        **native.buffers(dweight=dweight, dscale=dscale),
    )
    return dweight, dscale
