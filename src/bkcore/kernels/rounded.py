"""The sweep on numbers that are rounded to codes: the operator `bkcore::sweep_rounded`.

It gives, bit for bit, what rounding v, `bkcore::sweep` in float32 and rounding the result give, in
one pass over memory: what a quantized core computes when floats go in and come out. Each part, v
and Re and Im of the output, has a scale and a zero point for every `group_size` neighbouring sites;
the last group may be smaller. A number x is rounded to

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

from bkcore.errors import DTypeError, InputError, ShapeError
from bkcore.kernels.backend import empty_parts
from bkcore.kernels.codes import bounds_between, check_levels
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
) -> None:
    if bits not in (4, 8):
        raise InputError(f"bits must be 4 or 8, not {bits}")
    check_sweep(v, None, energy, eta, hopping, two_sided)
    if v.dtype != torch.float32:
        raise DTypeError(f"v must be float32, got {v.dtype}: codes are made from float32")
    if group_size < 1:
        raise InputError(f"group_size must be at least 1, not {group_size}")
    groups = -(-v.shape[1] // group_size)
    for name, x in (("scale", scale), ("zero", zero)):
        if x.shape != (3, groups):
            raise ShapeError(
                f"{name} must be (3, {groups}) for {v.shape[1]} sites in groups of {group_size}, "
                f"got {tuple(x.shape)}"
            )
        if x.dtype != torch.float32 or x.device != v.device:
            raise DTypeError(
                f"{name} must be float32 on {v.device} like v, got {x.dtype} on {x.device}"
            )
    if levels is not None and levels.shape != (3, 2**bits):
        raise ShapeError(
            f"levels must be (3, {2**bits}), a level for every code of {bits} bits, got "
            f"{tuple(levels.shape)}"
        )


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
    _check(v, energy, eta, hopping, scale, zero, levels, group_size, bits, two_sided)
    if not float(scale.min()) >= torch.finfo(torch.float32).tiny:
        raise InputError("scale must be positive, normal float32 numbers; some are not")
    if levels is not None:
        check_levels("levels", levels)
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
