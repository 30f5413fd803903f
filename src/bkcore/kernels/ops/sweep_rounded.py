"""The sweep of numbers rounded to codes: the operator `bkcore::sweep_rounded`.

In one pass over memory, the result is bit for bit that of rounding v, `bkcore::sweep` in float32,
and rounding its output. This is what a quantized core computes with float inputs and outputs. Each
of v and Re and Im of the output has one scale and zero point for every `group_size` neighbouring
sites; the last group may be smaller, and a group size above N means N. A number x is rounded to

    scale * (clamp(round(x / scale) + zero, -2^(bits-1), 2^(bits-1) - 1) - zero)

as in `bkcore.quantization.affine`, or with levels to scale * (level - zero) for the level nearest
to x / scale + zero, the lower one if two are equally near. NaN stays NaN. The operator has no
derivative.

Layout
------
    v       float32 (B, N, H), as in `bkcore.kernels.ops.sweep`
    energy  (H,), eta (R, H), hopping (R, H)   float32, likewise
    scale, zero   float32 (3, G): of v, of Re and of Im of the output; G = ceil(N / group_size)
    levels  float32 (3, 2^bits), ascending: what the codes stand for in place of
            -2^(bits-1), ..., 2^(bits-1) - 1; optional
    result  float32 (B, N, 2, H), in v's order in memory
"""

from __future__ import annotations

import torch
from torch import Tensor

from bkcore.errors import DTypeError
from bkcore.kernels.backends.interface import Backend, Sweep, SweepRounded
from bkcore.kernels.checks import (
    check_bits,
    check_levels,
    check_tensors,
    count_groups,
    fit_group_size,
)
from bkcore.kernels.layout import dense, empty_parts, parameter_rows
from bkcore.kernels.ops.contract import define
from bkcore.kernels.ops.sweep import check_sweep
from bkcore.kernels.ops.sweep_codes import contiguous, require_ascending, require_normal


def sweep_rounded(
    v: Tensor,
    energy: Tensor,
    eta: Tensor,
    hopping: Tensor,
    scale: Tensor,
    zero: Tensor,
    group_size: int,
    bits: int = 8,
    two_sided: bool = False,
    *,
    levels: Tensor | None = None,
) -> Tensor:
    """Round, sweep, round; layout and rounding are at the top of this module.

    Returns:
        (B, N, 2, H), in v's order in memory.

    Raises:
        ShapeError, DTypeError, InputError: the tensors do not fit together, bits is not 4 or 8, a
            scale is not a positive, normal number, or levels do not ascend.
        BackendError: a forced backend is not available or cannot take the tensors.
    """
    parts: Tensor = torch.ops.bkcore.sweep_rounded.default(
        v, energy, eta, hopping, scale, zero, levels, group_size, bits, two_sided
    )
    return parts


def _check(args: SweepRounded) -> SweepRounded:
    v, bits = args.v, args.bits
    check_bits(bits)
    check_sweep(Sweep(v, None, args.energy, args.eta, args.hopping, args.two_sided))
    if v.dtype != torch.float32:
        raise DTypeError(f"v must be float32, not {v.dtype}; codes are computed from float32")
    sites = v.shape[1]
    group_size = fit_group_size(args.group_size, sites)
    shape = (3, count_groups(sites, group_size))
    check_tensors(
        {"scale": (args.scale, shape, torch.float32), "zero": (args.zero, shape, torch.float32)},
        v.device,
        lambda: f"for {sites} sites in groups of {group_size}",
    )
    check_levels("levels", args.levels, (3, 2**bits), v.device, bits)
    return args._replace(group_size=group_size)


def _run(backend: Backend, args: SweepRounded) -> Tensor:
    require_normal("scale", args.scale)
    require_ascending("levels", args.levels)
    return backend.sweep_rounded(
        args._replace(
            v=dense(args.v),
            eta=parameter_rows(args.eta),
            hopping=parameter_rows(args.hopping),
            scale=args.scale.contiguous(),
            zero=args.zero.contiguous(),
            levels=contiguous(args.levels),
        )
    )


def _like(args: SweepRounded) -> Tensor:
    return empty_parts(dense(args.v), 2)


define("sweep_rounded", SweepRounded, _check, _run, _like)
