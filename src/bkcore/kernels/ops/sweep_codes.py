"""The sweep from integer codes to integer codes: the operator `bkcore::sweep_codes`.

A code q stands for scale * (q - zero), and a number x becomes clamp(round(x / scale) + zero), ties
to even. The result is bit for bit that of decoding, `bkcore::sweep` in float32, and encoding, but
the float tensors are never in memory. The operator has no derivative.

Layout
------
    v, source   8 bits: int8 (B, N, H);  4 bits: uint8 (B, N, ceil(H / 2)), the even lane low
    energy (H,), eta (R, H), hopping (R, H)   float32, as in `bkcore.kernels.ops.sweep`
    in_scale, in_zero     (1 or 2, R, H)  of v and the source; R = 1, or N for one per site
    out_scale, out_zero   (2 or 4, R, H)  of Re g, Im g (or G), Re psi, Im psi; scales float32,
                          zero points float32 or int8
    in_levels             float32 (1 or 2, 2^bits), ascending: non-uniform levels, optional
    out_levels            (2 or 4, 2^bits)
    result      8 bits: int8 (B, N, C, H);  4 bits: uint8 (B, N, C, ceil(H / 2))

With levels, a code q stands for scale * (level of q - zero), where the lowest code has the first
level. x becomes the code whose level is nearest to x / scale + zero, or the lower one if two are
equally near.

Scales are positive, normal float32 numbers. A NaN, which can come only from NaN parameters, becomes
the lowest code, and so does minus infinity.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bkcore.errors import InputError, ShapeError
from bkcore.kernels.backends.interface import Backend, SweepCodes
from bkcore.kernels.checks import check_bits, check_levels, check_tensors
from bkcore.kernels.ops.contract import define
from bkcore.kernels.ops.sweep import check_chain, check_source


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
        two_sided: return the two-sided diagonal G instead of g.
        in_levels, out_levels: (1 or 2, 2^bits), (2 or 4, 2^bits): the ascending levels of the
            codes, if they are not uniform.

    Returns:
        Codes (B, N, 2 or 4, H), stored as in v.

    Raises:
        ShapeError, DTypeError, InputError: the tensors do not fit together, bits is not 4 or 8, a
            scale is not a positive, normal number, or levels are not ascending.
        BackendError: a forced backend is not available or cannot take the tensors.
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


def _check(args: SweepCodes) -> SweepCodes:
    v, energy, bits = args.v, args.energy, args.bits
    check_bits(bits)
    if energy.ndim != 1 or v.ndim != 3 or v.shape[2] != -(-energy.shape[0] * bits // 8):
        raise ShapeError(
            f"v of shape {tuple(v.shape)} does not hold {bits}-bit codes (B, N, "
            f"{-(-energy.shape[-1] * bits // 8) if energy.ndim else 1}) for energy of shape "
            f"{tuple(energy.shape)}"
        )
    sites, lanes = v.shape[1], energy.shape[0]
    if sites < 1:
        raise ShapeError(f"v must be (B, N, H) with N >= 1, not {tuple(v.shape)}")
    check_source(args.two_sided, args.source)

    def why() -> str:
        return f"for {bits}-bit codes of {sites} sites and {lanes} lanes"

    codes = torch.int8 if bits == 8 else torch.uint8
    check_tensors(
        {"v": (v, v.shape, codes), "source": (args.source, v.shape, codes)}, v.device, why
    )
    chain = energy, args.eta, args.hopping
    check_chain(*chain, (sites, lanes), torch.float32, v.device, why)
    inputs, outputs = (1, 2) if args.source is None else (2, 4)
    for name, x, parts in (
        ("in_scale", args.in_scale, inputs),
        ("in_zero", args.in_zero, inputs),
        ("out_scale", args.out_scale, outputs),
        ("out_zero", args.out_zero, outputs),
    ):
        if x.ndim != 3 or x.shape[::2] != (parts, lanes) or x.shape[1] not in (1, sites):
            raise ShapeError(
                f"{name} must be ({parts}, 1, {lanes}) or ({parts}, {sites}, {lanes}), not "
                f"{tuple(x.shape)}"
            )
        whole = name.endswith("zero") and x.dtype == torch.int8
        check_tensors({name: (x, x.shape, torch.int8 if whole else torch.float32)}, v.device, why)
    check_levels("in_levels", args.in_levels, (inputs, 2**bits), v.device, bits)
    check_levels("out_levels", args.out_levels, (outputs, 2**bits), v.device, bits)
    return args


def _run(backend: Backend, args: SweepCodes) -> Tensor:
    require_normal("in_scale", args.in_scale)
    require_normal("out_scale", args.out_scale)
    require_ascending("in_levels", args.in_levels)
    require_ascending("out_levels", args.out_levels)
    return backend.sweep_codes(
        args._replace(
            v=args.v.contiguous(),
            source=contiguous(args.source),
            energy=args.energy.contiguous(),
            eta=args.eta.contiguous(),
            hopping=args.hopping.contiguous(),
            in_zero=args.in_zero.float(),
            out_zero=args.out_zero.float(),
            in_levels=contiguous(args.in_levels),
            out_levels=contiguous(args.out_levels),
        )
    )


def _like(args: SweepCodes) -> Tensor:
    batch, sites, row = args.v.shape
    return args.v.new_empty(batch, sites, 2 if args.source is None else 4, row)


def contiguous(x: Tensor | None) -> Tensor | None:
    """x made contiguous; None stays None."""
    return None if x is None else x.contiguous()


def require_normal(name: str, scale: Tensor) -> None:
    """Raise `InputError` unless scales are positive, normal numbers."""
    limits = torch.finfo(torch.float32)
    if not torch.equal(scale.clamp(limits.tiny, limits.max), scale):
        raise InputError(f"{name} must be positive, normal float32 numbers; some are not")


def require_ascending(name: str, levels: Tensor | None) -> None:
    """Raise `InputError` unless each row of levels, if given, is finite and strictly ascending."""
    if levels is not None and not bool((levels.diff() > 0).all() & levels.isfinite().all()):
        raise InputError(
            f"{name} must be ascending, finite numbers, none twice; sort them, and drop NaN"
        )


define("sweep_codes", SweepCodes, _check, _run, _like)
