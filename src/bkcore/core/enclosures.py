"""Balls that contain the exact result for float inputs, computed from quantized inputs.

`diagonal_enclosure`, `propagated_enclosure` and `attention_enclosure` account for every error.
Given the float inputs p and the inputs p' that replace them (dequantized codes), each returns a
ball that contains the *exact* result at p. Its centre is the result at p' in float64; its radius
covers the change from p' to p and all round-off of float64. So any approximation of the result,
whether rounded to float32 or to codes, clipped or not, errs by at most
`|approximation - centre| + radius`. The first term is known exactly: it is the error of codes and
float32 (`Enclosure.bound`).

Round-off. u = 2^-53. The reciprocal of a complex number has a relative error below `sqrt(2) 4 u`,
and a sum or product of reals one of u (Higham, *Accuracy and Stability of Numerical Algorithms*,
2nd ed., section 3.6). So the computed continued fraction is the exact one for a diagonal that is
off by rho_i, `|rho_i| <= 8 u (|1/g_i| + |v_i| + |onsite| + |z| + t^2 |g_{i-1}|)`. That is one more
perturbation of the potential, and the resolvent identity also holds for a complex one. Radii are
sums and products of non-negative numbers, enlarged by the most that rounding can have taken off.

Along the chain. For a causal chain whose bonds also change, the identity becomes a recurrence. With
A_i the diagonal of H - z,

    1/g'_i - 1/g_i = (A'_i - A_i) - (t'_i^2 - t_i^2) g'_{i-1} - t_i^2 (g'_{i-1} - g_{i-1})

    |g'_i - g_i| <= |g_i g'_i| (|c_i| + t_i^2 |g'_{i-1} - g_{i-1}|),
             c_i = A'_i - A_i - (t'_i^2 - t_i^2) g'_{i-1}.

Unrolled, it is `sum_j |G_ij| |G'_ij| |c_j|`: `ward_bound` before the Cauchy-Schwarz inequality, and
so never above it. In the Hamiltonian of resolvent attention, A = 1 + t^2 + v - i eta, a bond and
the site after it change together, which leaves
`c_i = v'_i - v_i + (t'_i^2 - t_i^2)(1 - g'_{i-1})`. The bond hardly contributes, since g is close
to 1 there (H = L L^T). With w'_i = k'_i u'_i^T + t'_i psi'_{i-1}, the propagated source
psi_i = g_i w_i obeys, for every entry of the matrix,

    |psi'_i - psi_i| <= |g'_i - g_i| |w'_i| + |g_i| (|k'_i u'_i^T - k_i u_i^T|
                        + |t'_i - t_i| |psi'_{i-1}| + |t_i| |psi'_{i-1} - psi_{i-1}|)

and the output obeys `|out' - out| <= |(q' - q)^T psi'| + |q|^T |psi' - psi|`. Bounds on every entry
are never above the same bounds in norms. But moduli lose the phase: in resolvent attention Im psi
is of first order in eta, and would be lost in the bound on Re psi. So every modulus is carried
together with bounds on the real and the imaginary part (`Moduli`).
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor

from bkcore.core.arguments import (
    real,
    require_alike,
    require_bool,
    require_positive,
    require_real_float,
    split_z,
)
from bkcore.core.attention import AttentionInputs
from bkcore.core.moduli import Moduli
from bkcore.core.operator import weighted_row_norms
from bkcore.core.resolvent import resolvent_diagonal
from bkcore.errors import ShapeError
from bkcore.kernels.backends.interface import Attention
from bkcore.kernels.ops.attention import check_attention

__all__ = [
    "UNIT",
    "AttentionEnclosure",
    "Enclosure",
    "attention_enclosure",
    "diagonal_enclosure",
    "propagated_enclosure",
]

Value = TypeVar("Value", bound=complex | Tensor)

UNIT = 2.0**-53
"""Unit round-off of float64."""


class Enclosure(NamedTuple):
    """A ball around every entry of a result: `|exact - centre| <= radius`.

    Attributes:
        centre: float64 or complex128.
        radius: float64, not negative, of the same shape; NaN where an input was NaN.
    """

    centre: Tensor
    radius: Tensor

    def bound(self, result: Tensor) -> Tensor:
        """The largest possible error of `result`, in float64: distance from the centre + radius."""
        return (result - self.centre).abs() * (1 + 4 * UNIT) + self.radius


class AttentionEnclosure(NamedTuple):
    """Balls around g, complex (B, N, H), and around Re and Im of out, (B, N, H, U) each.

    There is also one around Im g / eta, (B, N, H), whose centre is computed from the exact inputs,
    so that its radius is only round-off.
    """

    g: Enclosure
    real: Enclosure
    imag: Enclosure
    memory: Enclosure


@torch.no_grad()
def diagonal_enclosure(
    v: Tensor,
    v_perturbed: Tensor,
    z: complex | Tensor,
    *,
    hopping: float | Tensor = 1.0,
    onsite: float | Tensor = -2.0,
    causal: bool = False,
) -> Enclosure:
    """A ball that contains the exact diagonal for v, computed from v_perturbed.

    Its radius is `ward_bound` plus the round-off of float64. Let delta bound the backward errors
    rho of the sweeps; it is computed from their results. Each row of products of computed factors
    is the row of a resolvent whose potential is off by at most delta. For delta <= eta / 2, such a
    resolvent has norm at most 2 / eta. So with w_j = |dv_j|, a computed
    `sqrt(sum_j |G_ij|^2 w_j)` is too small by at most `2 delta sqrt(max w) / eta^2`, and the centre
    is off by at most `2 delta / eta^2`. The ball never reaches further than the disc requires.

    Args:
        v: the exact real potential (..., N), N >= 1.
        v_perturbed: the potential that the result was computed from, (..., N).
        z, hopping, onsite, causal: as in `ward_bound`; the same for both potentials.

    Returns:
        Enclosure of shape (..., N), centre complex128. O(N).

    Raises:
        DTypeError: v or v_perturbed is complex.
        InputError: Im z <= 0.
        ShapeError: N = 0, or the shapes do not broadcast.
    """
    require_alike(v, v_perturbed)
    require_bool("causal", causal)
    v, v_perturbed = v.double(), v_perturbed.double()
    width = split_z(z, v)[1]
    hopping, onsite = _double(real("hopping", hopping, v)), _double(real("onsite", onsite, v))
    z = _double(z) if isinstance(z, Tensor) else complex(z)
    chain: dict[str, Any] = {"hopping": hopping, "onsite": onsite, "causal": causal}
    eta = _float64(width, v)
    eta = eta.amin(-1, keepdim=True) if eta.ndim else eta
    size = (v_perturbed - v).abs()
    largest = size.amax(-1, keepdim=True).sqrt()
    reaches, deltas = [], []
    for potential in (v, v_perturbed):
        delta = _backward_error(potential, z, **chain)
        row = weighted_row_norms(potential, z, size, **chain).sqrt()
        reaches.append(row + largest * 2 * delta / eta**2)
        deltas.append(delta)
    centre = resolvent_diagonal(v_perturbed, z, **chain)
    rounding = 1 + 32 * v.shape[-1] * UNIT
    radius = reaches[0] * reaches[1] * rounding + 2 * deltas[1] / eta**2
    resolved = torch.maximum(*deltas) <= eta / 2
    radius = torch.where(resolved, radius, radius.new_tensor(torch.inf))
    return Enclosure(centre, torch.minimum(radius, _reach_of_disc(centre, eta)))


@torch.no_grad()
def propagated_enclosure(
    v: Tensor,
    source: Tensor,
    v_perturbed: Tensor,
    source_perturbed: Tensor,
    *,
    energy: float | Tensor,
    eta: float | Tensor,
    hopping: float | Tensor = 1.0,
    hopping_perturbed: float | Tensor | None = None,
    onsite: float | Tensor = -2.0,
) -> tuple[Enclosure, Enclosure]:
    """Balls that contain the exact g and psi of `causal_sweep` for v, source and hopping.

    Args:
        v, source: exact inputs, real (B, N, H), N >= 1.
        v_perturbed, source_perturbed: what the result was computed from, (B, N, H).
        energy, onsite: number, or real tensor () or (H,).
        eta: number, or real tensor () or (H,), > 0.
        hopping: number, or real tensor that broadcasts to (B, N, H), of any sign. In (B, N, H),
            hopping i is the bond from site i - 1 to i, and that of the first site is ignored.
        hopping_perturbed: the same; None if it is exact.

    Returns:
        Enclosures of g and of psi, (B, N, H), centres complex128. O(N).

    Raises:
        DTypeError: v or a source is not real floating point.
        InputError: eta <= 0.
        ShapeError: N = 0, or the shapes do not fit.
    """
    require_positive("eta", eta)
    hopping_perturbed = hopping if hopping_perturbed is None else hopping_perturbed
    both = []
    for potential, b, t in (
        (v, source, hopping),
        (v_perturbed, source_perturbed, hopping_perturbed),
    ):
        require_real_float("v", potential)
        require_real_float("source", b)
        if v.ndim != 3 or not v.shape[1] or not v.shape == potential.shape == b.shape:
            raise ShapeError(
                "potentials and sources must be (B, N, H) like v, N >= 1, not "
                f"{tuple(v.shape)}, {tuple(potential.shape)} and {tuple(b.shape)}"
            )
        both.append((potential.double(), b.double()[..., None], _bonds(t, v)))
    base, energy, width = (_float64(x, v) for x in (onsite, energy, eta))
    shift, width = base - energy, width.expand(v.shape[-1])
    size = base.abs() + energy.abs() + width
    one = torch.ones_like(both[0][1])
    chains = [
        _Chain(potential + shift - 1j * width, potential.abs() + size, t, one, b, one)
        for potential, b, t in both
    ]
    g, _, psi, (modulus, _, _) = _enclose(chains[0], chains[1], width)
    return g, Enclosure(psi[..., 0], modulus[..., 0])


@torch.no_grad()
def attention_enclosure(
    exact: AttentionInputs, perturbed: AttentionInputs, eta: Tensor
) -> AttentionEnclosure:
    """Balls that contain the exact result of `resolvent_attention` for the inputs `exact`.

    The state before the first site is empty. The bound adds up moduli, while independent rounding
    errors of different sites and keys add up only in squares. So the longer the memory and the
    wider the keys, the further the bound is above the error.

    Args:
        exact: the exact inputs, real.
        perturbed: the inputs that the result was computed from, of the same shapes.
        eta: (H,), positive; the same for both.

    Returns:
        The enclosures, in float64. O(N) in time and memory.

    Raises:
        DTypeError: an input is not real floating point.
        InputError: eta is not positive.
        ShapeError: the inputs do not fit together.
    """
    require_positive("eta", eta)
    chains = []
    for inputs in (exact, perturbed):
        for name, x in inputs._asdict().items():
            require_real_float(name, x)
        query, key, value, hopping, potential = (x.double() for x in inputs)
        energy, width = torch.zeros_like(eta).double(), eta.double()
        check_attention(
            Attention(potential, hopping, energy, width, query, key, value, None, None, keep=False)
        )
        t = _bonds(hopping, potential)
        size = 1 + t.square() + potential.abs() + width
        diagonal = 1 + t.square() + potential - 1j * width
        chains.append(_Chain(diagonal, size, t, query, key, value))
    if any(x.shape != y.shape for x, y in zip(exact, perturbed, strict=True)):
        raise ShapeError("the exact and the perturbed inputs must have the same shapes")
    g, exact_g, out, (_, real, imag) = _enclose(chains[0], chains[1], eta.double())
    memory = Enclosure(exact_g.centre.imag / eta, exact_g.radius / eta * (1 + 4 * UNIT))
    return AttentionEnclosure(g, Enclosure(out.real, real), Enclosure(out.imag, imag), memory)


class _Chain(NamedTuple):
    """The inputs of the recurrences, in float64.

    diagonal (B, N, H): A = H_ii - z, complex. size (B, N, H): the sum of the moduli of its terms.
    hopping (B, N, H): to the previous site, 0 for the first. query, key (B, N, H, K), value
    (B, N, H, U).
    """

    diagonal: Tensor
    size: Tensor
    hopping: Tensor
    query: Tensor
    key: Tensor
    value: Tensor


def _enclose(
    exact: _Chain, perturbed: _Chain, eta: Tensor
) -> tuple[Enclosure, Enclosure, Tensor, tuple[Tensor, ...]]:
    """Two balls around g, with centres g' and g; out' (B, N, H, U); bounds on Re, Im of out' - out.

    The radius of the second ball around g is only round-off.
    """
    greens, unchanged, sizes, drifts = _green_drift(exact, perturbed, eta)
    keys, values = exact.key.shape[-1], exact.value.shape[-1]
    psi = greens.new_zeros(*greens[:, 0].shape, keys, values)
    drift = Moduli.of(psi)
    outs, radii = [], []
    for i, (g, size, change) in enumerate(zip(greens.unbind(1), sizes, drifts, strict=True)):
        a, b = (_Chain(*(x[:, i] for x in chain)) for chain in (exact, perturbed))
        psi, drift = _psi_drift(a, b, psi, drift, g, size, change)
        out, radius = _read(a.query, b.query, psi, drift)
        outs.append(out)
        radii.append(radius)
    rounding = 1 + 64 * (len(outs) + keys) * UNIT
    moved = torch.stack([x.modulus for x in drifts], 1)
    bounds = [torch.stack(parts, 1) * rounding for parts in zip(*radii, strict=True)]
    changed = Enclosure(greens, moved * rounding)
    return changed, unchanged, torch.stack(outs, 1), tuple(bounds)


def _green_drift(
    exact: _Chain, perturbed: _Chain, eta: Tensor
) -> tuple[Tensor, Enclosure, list[Moduli], list[Moduli]]:
    """g' and a ball around g, (B, N, H); and per site, (B, H), bounds on the exact g and g' - g."""
    g = g2 = torch.zeros_like(exact.diagonal[:, 0])
    lost = torch.zeros_like(eta) * g.real  # round-off of g
    drift = Moduli.of(g)
    greens, sizes, drifts, unchanged = [], [], [], []
    for i in range(exact.diagonal.shape[1]):
        a, a2 = exact.diagonal[:, i], perturbed.diagonal[:, i]
        t, t2 = exact.hopping[:, i], perturbed.hopping[:, i]
        size, size2 = exact.size[:, i], perturbed.size[:, i]
        squares = t.square()
        # With s = 1/(computed g) - 1/g: |computed g - g| = |g^2 s / (1 - g s)|, g the computed one.
        below = a - squares * g
        relative = below.abs() + size + squares * g.abs()
        relative = (8 * UNIT * relative + squares * lost) / below.abs()
        g = 1 / below
        lost = torch.where(relative < 0.5, g.abs() * relative / (1 - relative), g.abs() + 1 / eta)

        change = (a2 - a) - (t2 - t) * (t2 + t) * g2
        below = a2 - t2.square() * g2
        rounding = below.abs() + size + size2 + (squares + t2.square()) * g2.abs()
        moved = Moduli.of(change).widened(16 * UNIT * rounding) + drift.times(squares)
        g2 = 1 / below
        both = Moduli.of(g * g2).widened(g2.abs() * (lost + 4 * UNIT * g.abs()))
        drift = (both * moved).at_most(_reach_of_disc(g2, eta))
        greens.append(g2)
        sizes.append(Moduli.of(g).widened(lost))
        drifts.append(drift)
        unchanged.append(Enclosure(g, lost))
    ball = Enclosure(*(torch.stack(parts, 1) for parts in zip(*unchanged, strict=True)))
    return torch.stack(greens, 1), ball, sizes, drifts


def _psi_drift(
    a: _Chain, b: _Chain, psi: Tensor, drift: Moduli, g: Tensor, size: Moduli, change: Moduli
) -> tuple[Tensor, Moduli]:
    """psi' (B, H, K, U) of a site and a bound on psi' - psi, from those of the previous site.

    a, b: exact and perturbed inputs of the site. g: g'. size, change: bounds on g and g' - g.
    """
    g, t, t2 = (x[..., None, None] for x in (g, a.hopping, b.hopping))
    size, change = (Moduli(*(x[..., None, None] for x in y.parts())) for y in (size, change))
    source, written = (x.key[..., :, None] * x.value[..., None, :] for x in (a, b))
    fresh = (written - source).abs()
    fresh = fresh + 4 * UNIT * (written.abs() + fresh)
    behind = Moduli.of(psi)
    old = behind.times((t2 - t).abs()) + drift.times(t.abs())
    old = old + Moduli(fresh, fresh, torch.zeros_like(fresh))
    w = written + t2 * psi
    rounding = 16 * UNIT * g.abs() * (written.abs() + t2.abs() * behind.modulus)
    return g * w, (change * Moduli.of(w) + size * old).widened(rounding)


def _read(
    query: Tensor, perturbed: Tensor, psi: Tensor, drift: Moduli
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """q'^T psi' (B, H, U), and bounds on the modulus and parts of q'^T psi' - q^T psi."""
    out, moved = ((x[..., None] * psi).sum(-2) for x in (perturbed, perturbed - query))
    moduli = query.abs()[..., None]
    rounding = ((moduli + perturbed.abs()[..., None]) * psi.abs()).sum(-2)
    size = Moduli.of(moved) + Moduli(*((moduli * x).sum(-2) for x in drift.parts()))
    return out, size.widened(4 * (query.shape[-1] + 4) * UNIT * rounding).parts()


def _bonds(hopping: float | Tensor, like: Tensor) -> Tensor:
    """Hoppings (B, N, H) in float64, with 0 before the first site."""
    t = _float64(hopping, like)
    try:
        t = t.expand(like.shape).clone()
    except RuntimeError as error:
        raise ShapeError(f"hopping {tuple(t.shape)} does not fit {tuple(like.shape)}") from error
    t[:, :1] = 0
    return t


def _backward_error(
    v: Tensor, z: complex | Tensor, hopping: float | Tensor, onsite: float | Tensor, causal: bool
) -> Tensor:
    """A bound on the distance from v to the potential of the computed sections: (..., 1)."""
    squares = _float64(hopping, v).square()
    chain: dict[str, Any] = {"hopping": hopping, "onsite": onsite}
    left = resolvent_diagonal(v, z, causal=True, **chain)
    from_left = _after(squares * left[..., :-1])
    from_right = torch.zeros_like(from_left)
    fractions = [(left, from_left)]
    if not causal:
        flipped = {name: _flip(x) for name, x in chain.items()}
        right = resolvent_diagonal(v.flip(-1), _flip(z), causal=True, **flipped).flip(-1)
        from_right = _after((squares * right[..., 1:]).flip(-1)).flip(-1)
        whole = resolvent_diagonal(v, z, **chain)
        fractions += [(right, from_right), (whole, from_left + from_right)]
    size = torch.as_tensor(z, dtype=torch.complex128, device=v.device).abs()
    size = v.abs() + _float64(onsite, v).abs() + size
    terms = size + from_left.abs() + from_right.abs()
    errors = [
        (1 / g - (v + onsite - z - beside)).abs() + 16 * UNIT * (1 / g.abs() + terms)
        for g, beside in fractions
    ]
    return torch.stack(errors).amax(0).amax(-1, keepdim=True)


def _after(x: Tensor) -> Tensor:
    """x shifted by one site, with a zero first."""
    return torch.cat((x.new_zeros(*x.shape[:-1], 1), x), -1)


def _flip(x: Value) -> Value:
    return cast(Value, x.flip(-1)) if isinstance(x, Tensor) and x.ndim else x


def _float64(x: float | Tensor, like: Tensor) -> Tensor:
    """A number or a real tensor as a float64 tensor on the device of `like`."""
    return torch.as_tensor(x, dtype=torch.float64, device=like.device)


def _double(x: Value) -> Value:
    """A tensor in float64 or complex128; a number unchanged."""
    if not isinstance(x, Tensor):
        return x
    return cast(Value, x.to(torch.complex128 if x.is_complex() else torch.float64))


def _reach_of_disc(centre: Tensor, eta: Tensor) -> Tensor:
    """The largest distance from `centre` to a point of the disc of all Green's functions."""
    return ((centre - 0.5j / eta).abs() + 0.5 / eta) * (1 + 8 * UNIT)
