"""Bounds on a resolvent that hold before it is computed, and on its error before it is measured.

For real v, every Green's function here, two-sided or left-connected, lies in one disc
(`disc_range`, `in_disc`). A left step brings two states in that disc closer together
(`contraction_factor`). The Ward identity `sum_j |G_ij|^2 = Im G_ii / eta` bounds the change of the
diagonal under a perturbed potential, without perturbation theory:

    |G'_ii - G_ii| <= sqrt(sum_j |G_ij|^2 |dv_j|) sqrt(sum_j |G'_ij|^2 |dv_j|)   (ward_bound)
                   <= max|dv| sqrt(Im G_ii Im G'_ii) / eta                       (maximum_bound)
                   <= max|dv| / eta^2                                            (uniform_bound)

The first line combines the second resolvent identity `G' - G = -G diag(dv) G'` with the
Cauchy-Schwarz inequality; the others follow from the Ward identity and from the disc. All of this
is exact mathematics; the computed sides carry the round-off of their sweeps.

`bkcore.core.enclosures` adds the round-off of float64, and bounds quantities propagated along a
chain.
"""

from __future__ import annotations

from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from bkcore.core.arguments import (
    real,
    require_alike,
    require_broadcast,
    require_complex,
    require_real_float,
)
from bkcore.core.operator import weighted_row_norms
from bkcore.deprecated import moved_names
from bkcore.errors import InputError, ShapeError

__all__ = [
    "contraction_factor",
    "disc_range",
    "in_disc",
    "maximum_bound",
    "uniform_bound",
    "ward_bound",
]

__getattr__ = moved_names(__name__)

Number = TypeVar("Number", float, Tensor)


def disc_range(eta: Number) -> tuple[tuple[Number, Number], tuple[Number, Number]]:
    """The ranges of Re G and Im G that need no calibration.

    Args:
        eta: Im z > 0, a number or a tensor (one per channel, say).

    Returns:
        `((-1/(2 eta), 1/(2 eta)), (0, 1/eta))` for the real and the imaginary part; numbers or
        tensors, like eta.

    Raises:
        InputError: eta <= 0.
    """
    eta = cast(Number, _checked_eta(eta))
    return (-0.5 / eta, 0.5 / eta), (0.0 * eta, 1.0 / eta)


def in_disc(G: Tensor, eta: float | Tensor, *, tolerance: float | None = None) -> Tensor:
    """Whether each G lies in the disc `|G - i/(2 eta)| <= 1/(2 eta)`.

    The test is `eta |G|^2 <= Im G (1 + tolerance)`, the same disc written so that round-off is
    relative to G even near 0, where strong potentials put it. Zero is in the disc, NaN is not.

    Args:
        G: complex Green's functions, any shape.
        eta: Im z > 0, a number or a tensor that broadcasts against G.
        tolerance: relative; by default 16 units of round-off of G's dtype, since single sites lie
            on the circle itself.

    Returns:
        bool, in the broadcast shape of G and eta.

    Raises:
        DTypeError: G is not complex.
        InputError: eta <= 0.
    """
    require_complex("G", G)
    eta = _checked_eta(eta)
    require_broadcast(G=G, eta=eta)
    allowed = 16 * torch.finfo(G.dtype).eps if tolerance is None else tolerance
    modulus = G.abs()
    return eta * modulus * modulus <= G.imag * (1 + allowed)


def contraction_factor(hopping: Number, eta: Number) -> Number:
    """`t^2 / (t^2 + eta^2)`: one left step shrinks hyperbolic distance at least by this factor.

    In the upper half-plane, the step `g -> 1 / (a - z - t^2 g)` is a dilation by t^2, a real shift,
    a shift up by eta, and `w -> -1/w`. All except the shift by eta are isometries of the metric
    `|dw| / Im w`. That shift shrinks it by `y / (y + eta)` at height y, where y is at most
    `t^2 / eta` for states in the disc (which is geodesically convex, being a horodisc).

    Args:
        hopping: the bond t crossed by the step.
        eta: Im z > 0.

    Returns:
        A factor in [0, 1), a number or a tensor like the arguments.

    Raises:
        InputError: eta <= 0.
    """
    t, width = real("hopping", hopping), _checked_eta(eta)
    require_broadcast(hopping=t, eta=width)
    # Divided by the larger of the two, so that no square overflows.
    factor: Any
    if isinstance(t, Tensor) or isinstance(width, Tensor):
        dtype = torch.promote_types(torch.result_type(t, width), torch.get_default_dtype())
        both = [torch.as_tensor(x, dtype=torch.float64) for x in (t, width)]
        scale = torch.maximum(*(x.detach().abs() for x in both))
        square, other = ((x / scale).square() for x in both)
        factor = (square / (square + other)).to(dtype)
    else:
        largest = max(abs(t), width)
        factor = (t / largest) ** 2 / ((t / largest) ** 2 + (width / largest) ** 2)
    return cast(Number, factor)


def ward_bound(
    v: Tensor,
    v_perturbed: Tensor,
    z: complex | Tensor,
    *,
    hopping: float | Tensor = 1.0,
    onsite: float | Tensor = -2.0,
    causal: bool = False,
) -> Tensor:
    """A certified bound on `|G'_ii - G_ii|` (causal: on `|g'_i - g_i|`), in O(N).

    It is `sqrt(sum_j |G_ij|^2 |dv_j|) sqrt(sum_j |G'_ij|^2 |dv_j|)` with `dv = v' - v`. In the
    causal form, G is the resolvent of the first i+1 sites, so only dv_0..dv_i enter. Each site's
    perturbation counts with its own reach. So the bound stays close to the error even if a few dv_j
    are much larger than the rest, unlike the maximum forms, and it is an equality if only one dv_j
    differs from 0.

    Args:
        v: real potential (..., N); N >= 1.
        v_perturbed: the potential after quantization, say; its shape broadcasts against that of v.
        z: complex number, or tensor (..., 1) or (..., N); Im z > 0. This is the only one of the
            bounds that does not need the same eta for all sites.
        hopping: number, or real tensor (..., N-1) or (..., 1), the same for both potentials.
        onsite: diagonal of H0, number or real tensor (..., N) or (..., 1).
        causal: bound the left-connected Green's function instead of the two-sided diagonal.

    Returns:
        Real (..., N).

    Raises:
        DTypeError: v or v_perturbed is complex.
        InputError: Im z <= 0.
        ShapeError: N = 0, or the shapes do not broadcast.
    """
    require_alike(v, v_perturbed)
    size = (v_perturbed - v).abs()
    before, after = (
        weighted_row_norms(potential, z, size, hopping=hopping, onsite=onsite, causal=causal)
        for potential in (v, v_perturbed)
    )
    return before.sqrt() * after.sqrt()


def maximum_bound(dv: Tensor, G: Tensor, G_perturbed: Tensor, eta: float | Tensor) -> Tensor:
    """`max_j |dv_j| sqrt(Im G_ii Im G'_ii) / eta`: the Ward bound without a sweep of its own.

    It needs only the diagonals. For left-connected Green's functions, the maximum over j <= i would
    be enough; the one over all j, used here, is never smaller.

    Args:
        dv: real perturbation (..., N).
        G: complex diagonal, two-sided or left-connected, (..., N).
        G_perturbed: the same of the perturbed potential, (..., N).
        eta: Im z > 0, a number or a tensor that broadcasts against G.

    Returns:
        Real (..., N).

    Raises:
        DTypeError: G or G_perturbed is not complex.
        InputError: eta <= 0.
    """
    require_real_float("dv", dv)
    require_complex("G", G)
    require_complex("G_perturbed", G_perturbed)
    eta = _checked_eta(eta)
    _require_sites(dv)
    require_broadcast(dv=dv, G=G, G_perturbed=G_perturbed, eta=eta)
    spread = G.imag.sqrt() * G_perturbed.imag.sqrt()
    return dv.abs().amax(-1, keepdim=True) * spread / eta


def uniform_bound(dv: Tensor, eta: float | Tensor) -> Tensor:
    """`max_j |dv_j| / eta^2`, a bound on the error of every site for any potential.

    Args:
        dv: real perturbation (..., N).
        eta: Im z > 0, a number or a tensor that broadcasts against dv.

    Returns:
        Real (..., 1).

    Raises:
        InputError: eta <= 0.
    """
    require_real_float("dv", dv)
    eta = _checked_eta(eta)
    _require_sites(dv)
    require_broadcast(dv=dv, eta=eta)
    return dv.abs().amax(-1, keepdim=True) / eta / eta


def _require_sites(dv: Tensor) -> None:
    if dv.ndim == 0 or dv.shape[-1] == 0:
        raise ShapeError(f"dv must be (..., N) with N >= 1, not {tuple(dv.shape)}")


def _checked_eta(eta: float | Tensor) -> float | Tensor:
    eta = real("eta", eta)
    if isinstance(eta, Tensor) and eta.is_meta:
        return eta
    if not bool(torch.as_tensor(eta > 0).all()):
        raise InputError(f"eta must be positive, not {eta}")
    return eta
