"""The sweep on numbers that are rounded to codes: the operator `bkcore::sweep_rounded`.

It gives, bit for bit, what rounding v, `bkcore::sweep` in float32 and rounding the result give, in
one pass over memory: what a quantized core computes when floats go in and come out. Each part, v
and Re and Im of the output, has a scale and a zero point for every `group_size` neighbouring sites;
the last group may be smaller, and a group size beyond N is N. A number x is rounded to

    scale * (clamp(round(x / scale) + zero, -2^(bits-1), 2^(bits-1) - 1) - zero)

as in `bkcore.quantization.affine`, or with levels to scale * (level - zero), with the level nearest
to x / scale + zero; halfway, the lower one. NaN stays NaN. It has no derivative.

Layout
------
    v       float32 (B, N, H), as in `bkcore.kernels.ops`
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
from bkcore.kernels.backend import empty_parts
from bkcore.kernels.checks import (
    check_bits,
    check_levels,
    check_tensors,
    count_groups,
    fit_group_size,
)
from bkcore.kernels.codes import bounds_between, require_ascending, require_normal
from bkcore.kernels.ops import check_sweep, dense, parameter_rows
from bkcore.kernels.selection import select

_library = torch.library.Library("bkcore", "FRAGMENT")
_library.define(
    "sweep_rounded(Tensor v, Tensor energy, Tensor eta, Tensor hopping, Tensor scale, Tensor zero,"
    " Tensor? levels, int group_size, int bits, bool two_sided) -> Tensor"
)


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
    """Round, sweep, round; layout and rounding are those of this module's text.

    Returns:
        (B, N, 2, H), in v's order in memory.

    Raises:
        ShapeError, DTypeError, InputError: the tensors do not fit together, bits is not 4 or 8, a
            scale is not a positive, normal number, or levels do not ascend.
        BackendError: a forced backend is absent or cannot take the tensors.
    """
    parts: Tensor = torch.ops.bkcore.sweep_rounded.default(
        v, energy, eta, hopping, scale, zero, levels, group_size, bits, two_sided
    )
    return parts


def _check(
    v: Tensor,
    energy: Tensor,
    eta: Tensor,
    hopping: Tensor,
    scale: Tensor,
    zero: Tensor,
    levels: Tensor | None,
    group_size: int,
    bits: int,
    two_sided: bool,
) -> int:
    """Raise if the arguments do not fit together; the group size that fits the sites."""
    check_bits(bits)
    check_sweep(v, None, energy, eta, hopping, two_sided)
    if v.dtype != torch.float32:
        raise DTypeError(f"v must be float32, got {v.dtype}: codes are made from float32")
    sites = v.shape[1]
    group_size = fit_group_size(group_size, sites)
    shape = (3, count_groups(sites, group_size))
    check_tensors(
        {"scale": (scale, shape, torch.float32), "zero": (zero, shape, torch.float32)},
        v.device,
        lambda: f"for {sites} sites in groups of {group_size}",
    )
    check_levels("levels", levels, (3, 2**bits), v.device, bits)
    return group_size


def _sweep_rounded(
    v: Tensor,
    energy: Tensor,
    eta: Tensor,
    hopping: Tensor,
    scale: Tensor,
    zero: Tensor,
    levels: Tensor | None,
    group_size: int,
    bits: int,
    two_sided: bool,
) -> Tensor:
    group_size = _check(v, energy, eta, hopping, scale, zero, levels, group_size, bits, two_sided)
    require_normal("scale", scale)
    if levels is not None:
        require_ascending("levels", levels)
    return select(v).sweep_rounded(
        dense(v),
        energy,
        parameter_rows(eta),
        parameter_rows(hopping),
        scale.contiguous(),
        zero.contiguous(),
        None if levels is None else levels.contiguous(),
        None if levels is None else bounds_between(levels),
        group_size,
        bits,
        two_sided,
    )


def _sweep_rounded_fake(
    v: Tensor,
    energy: Tensor,
    eta: Tensor,
    hopping: Tensor,
    scale: Tensor,
    zero: Tensor,
    levels: Tensor | None,
    group_size: int,
    bits: int,
    two_sided: bool,
) -> Tensor:
    _check(v, energy, eta, hopping, scale, zero, levels, group_size, bits, two_sided)
    return empty_parts(dense(v), 2)


_library.impl("sweep_rounded", _sweep_rounded, "CompositeExplicitAutograd")
torch.library.register_fake("bkcore::sweep_rounded", _sweep_rounded_fake, lib=_library)
