"""The sweep from integer codes to integer codes: the operator `bkcore::sweep_codes`.

A code q stands for scale * (q - zero), and a number x becomes clamp(round(x / scale) + zero), ties
to even. The operator gives, bit for bit, what decoding, `bkcore::sweep` in float32 and encoding
give, without the float tensors ever being in memory. It has no derivative.

Layout
------
    v, source   8 bits: int8 (B, N, H);  4 bits: uint8 (B, N, ceil(H / 2)), the even lane low
    energy (H,), eta (R, H), hopping (R, H)   float32, as in `bkcore.kernels.ops`
    in_scale, in_zero     (1 or 2, R, H)  of v and the source; R = 1, or N for one per site
    out_scale, out_zero   (2 or 4, R, H)  of Re g, Im g (or G), Re psi, Im psi; scales float32,
                          zero points float32 or int8
    in_levels             float32 (1 or 2, 2^bits), ascending: non-uniform levels, optional
    out_levels            (2 or 4, 2^bits)
    result      8 bits: int8 (B, N, C, H);  4 bits: uint8 (B, N, C, ceil(H / 2))

With levels a code q stands for scale * (level of q - zero), where the lowest code has the first
level, and x becomes the code whose level is nearest to x / scale + zero; halfway, the lower one.

Scales are positive, normal float32 numbers. A NaN, which only NaN parameters can give, becomes the
lowest code, and so does minus infinity.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bkcore.errors import InputError, ShapeError
from bkcore.kernels.checks import check_bits, check_levels, check_tensors
from bkcore.kernels.ops import check_chain, check_source
from bkcore.kernels.selection import select

_library = torch.library.Library("bkcore", "FRAGMENT")
_library.define(
    "sweep_codes(Tensor v, Tensor? source, Tensor energy, Tensor eta, Tensor hopping,"
    " Tensor in_scale, Tensor in_zero, Tensor out_scale, Tensor out_zero, Tensor? in_levels,"
    " Tensor? out_levels, int bits, bool two_sided) -> Tensor"
)


def sweep_codes(
    v: Tensor,
    source: Tensor | None,
    energy: Tensor,
    eta: Tensor,
    hopping: Tensor,
    in_scale: Tensor,
    in_zero: Tensor,
    out_scale: Tensor,
    out_zero: Tensor,
    bits: int = 8,
    two_sided: bool = False,
    *,
    in_levels: Tensor | None = None,
    out_levels: Tensor | None = None,
) -> Tensor:
    """Sweep codes to codes.

    Args:
        v, source: int8 (B, N, H), or at 4 bits uint8 (B, N, ceil(H / 2)) with the even lane low.
        energy, eta, hopping: float32 (H,), (1 or N, H), (1 or N, H), as in `bkcore.kernels.sweep`.
        in_scale, in_zero: (1 or 2, 1 or N, H), of v and the source.
        out_scale, out_zero: (2 or 4, 1 or N, H), of Re g, Im g, Re psi, Im psi.
        bits: 8 or 4.
        two_sided: give the two-sided diagonal G instead of g.
        in_levels, out_levels: (1 or 2, 2^bits), (2 or 4, 2^bits): what the codes stand for, if they
            are not uniform, ascending.

    Returns:
        Codes (B, N, 2 or 4, H) as v holds them.

    Raises:
        ShapeError, DTypeError, InputError: the tensors do not fit together, bits is not 4 or 8, a
            scale is not a positive, normal number, or levels do not ascend.
        BackendError: a forced backend is absent or cannot take the tensors.
    """
    codes: Tensor = torch.ops.bkcore.sweep_codes.default(
        v,
        source,
        energy,
        eta,
        hopping,
        in_scale,
        in_zero,
        out_scale,
        out_zero,
        in_levels,
        out_levels,
        bits,
        two_sided,
    )
    return codes


def _check(
    v: Tensor,
    source: Tensor | None,
    energy: Tensor,
    eta: Tensor,
    hopping: Tensor,
    in_scale: Tensor,
    in_zero: Tensor,
    out_scale: Tensor,
    out_zero: Tensor,
    in_levels: Tensor | None,
    out_levels: Tensor | None,
    bits: int,
    two_sided: bool,
) -> None:
    check_bits(bits)
    if energy.ndim != 1 or v.ndim != 3 or v.shape[2] != -(-energy.shape[0] * bits // 8):
        raise ShapeError(
            f"v of shape {tuple(v.shape)} does not hold {bits}-bit codes (B, N, "
            f"{-(-energy.shape[-1] * bits // 8) if energy.ndim else 1}) for energy of shape "
            f"{tuple(energy.shape)}"
        )
    sites, lanes = v.shape[1], energy.shape[0]
    if sites < 1:
        raise ShapeError(f"v must be (B, N, H) with N >= 1, got {tuple(v.shape)}")
    check_source(two_sided, source)

    def why() -> str:
        return f"for {bits}-bit codes of {sites} sites and {lanes} lanes"

    codes = torch.int8 if bits == 8 else torch.uint8
    check_tensors({"v": (v, v.shape, codes), "source": (source, v.shape, codes)}, v.device, why)
    check_chain(energy, eta, hopping, (sites, lanes), torch.float32, v.device, why)
    inputs, outputs = (1, 2) if source is None else (2, 4)
    for name, x, parts in (
        ("in_scale", in_scale, inputs),
        ("in_zero", in_zero, inputs),
        ("out_scale", out_scale, outputs),
        ("out_zero", out_zero, outputs),
    ):
        if x.ndim != 3 or x.shape[::2] != (parts, lanes) or x.shape[1] not in (1, sites):
            raise ShapeError(
                f"{name} must be ({parts}, 1, {lanes}) or ({parts}, {sites}, {lanes}), got "
                f"{tuple(x.shape)}"
            )
        whole = name.endswith("zero") and x.dtype == torch.int8
        check_tensors({name: (x, x.shape, torch.int8 if whole else torch.float32)}, v.device, why)
    check_levels("in_levels", in_levels, (inputs, 2**bits), v.device, bits)
    check_levels("out_levels", out_levels, (outputs, 2**bits), v.device, bits)


def _sweep_codes(
    v: Tensor,
    source: Tensor | None,
    energy: Tensor,
    eta: Tensor,
    hopping: Tensor,
    in_scale: Tensor,
    in_zero: Tensor,
    out_scale: Tensor,
    out_zero: Tensor,
    in_levels: Tensor | None,
    out_levels: Tensor | None,
    bits: int,
    two_sided: bool,
) -> Tensor:
    _check(
        v,
        source,
        energy,
        eta,
        hopping,
        in_scale,
        in_zero,
        out_scale,
        out_zero,
        in_levels,
        out_levels,
        bits,
        two_sided,
    )
    require_normal("in_scale", in_scale)
    require_normal("out_scale", out_scale)
    if in_levels is not None:
        require_ascending("in_levels", in_levels)
    if out_levels is not None:
        require_ascending("out_levels", out_levels)
    return select(v).sweep_codes(
        v.contiguous(),
        None if source is None else source.contiguous(),
        energy.contiguous(),
        eta.contiguous(),
        hopping.contiguous(),
        in_scale,
        in_zero.float(),
        out_scale,
        out_zero.float(),
        None if in_levels is None else in_levels.contiguous(),
        None if out_levels is None else bounds_between(out_levels),
        bits,
        two_sided,
    )


def require_normal(name: str, scale: Tensor) -> None:
    """Raise `InputError` unless scales are positive, normal numbers."""
    limits = torch.finfo(torch.float32)
    if not torch.equal(scale.clamp(limits.tiny, limits.max), scale):
        raise InputError(f"{name} must be positive, normal float32 numbers; some are not")


def require_ascending(name: str, levels: Tensor) -> None:
    """Raise `InputError` unless each row of levels is finite and ascends."""
    if not bool((levels.diff() > 0).all() & levels.isfinite().all()):
        raise InputError(
            f"{name} must be ascending, finite numbers, none twice; sort them, and drop NaN"
        )


def bounds_between(levels: Tensor) -> Tensor:
    """Halfway between neighbours: above bound i a number is nearer to level i + 1. (C, L)"""
    between = levels[:, :-1] + (levels[:, 1:] - levels[:, :-1]) / 2
    return torch.nn.functional.pad(between, (0, 1), value=torch.inf)


def _sweep_codes_fake(
    v: Tensor,
    source: Tensor | None,
    energy: Tensor,
    eta: Tensor,
    hopping: Tensor,
    in_scale: Tensor,
    in_zero: Tensor,
    out_scale: Tensor,
    out_zero: Tensor,
    in_levels: Tensor | None,
    out_levels: Tensor | None,
    bits: int,
    two_sided: bool,
) -> Tensor:
    _check(
        v,
        source,
        energy,
        eta,
        hopping,
        in_scale,
        in_zero,
        out_scale,
        out_zero,
        in_levels,
        out_levels,
        bits,
        two_sided,
    )
    return v.new_empty(v.shape[0], v.shape[1], 2 if source is None else 4, v.shape[2])


_library.impl("sweep_codes", _sweep_codes, "CompositeExplicitAutograd")
torch.library.register_fake("bkcore::sweep_codes", _sweep_codes_fake, lib=_library)
