"""The Birman-Schwinger operator of a one-dimensional Hamiltonian, applied in O(N).

`H = H0 + diag(v)` is tridiagonal; the diagonal of `H0` is `onsite`, its bonds `hopping`.
For `z = E + i eta` with `eta > 0` write `R0 = (H0 - z)^-1`. The operator of this module is

    K(z) = |V|^(1/2) R0(z) V^(1/2),    V^(1/2) = sgn(V) |V|^(1/2),

introduced by Birman (1961) and Schwinger (1961); Simon, *Trace Ideals and Their Applications*
(2nd ed., AMS 2005), collects its properties. Nothing here forms a matrix. The continued fractions
come from `bkcore.core.resolvent.resolvent_diagonal`.

Applying a resolvent to a vector in O(N). With `g` and `r` the left- and right-connected Green's
functions, the entries of `G = (H - z)^-1` factor as (Economou, *Green's Functions in Quantum
Physics*, 3rd ed., Springer 2006; Golub and Van Loan, *Matrix Computations*, section 4.3, for the
underlying elimination)

    G_ij = G_ii (-t_{i-1} g_{i-1}) (-t_{i-2} g_{i-2}) ... (-t_j g_j)          for j < i,

and likewise with `r` for `j > i`. So `(G b)_i = G_ii (b_i + L_i + R_i)`, where `L` obeys
`L_i = -t_{i-1} g_{i-1} (b_{i-1} + L_{i-1})` and `R` mirrors it: one sweep from each end,
meeting at every site (a twisted factorization; Babuska 1972, Parlett and Dhillon 1997). Forward
elimination and back substitution (the Thomas algorithm) cost the same, but they subtract two
numbers of size t/eta wherever a leading section of H has an eigenvalue at E. The two sweeps do not.
The squared moduli of the same factors give the weighted row sums `sum_j |G_ij|^2 w_j`.
"""

import math
from typing import NamedTuple, TypeVar, cast

import torch
from torch import Tensor

from bkcore.core.arguments import (
    real,
    require_bool,
    require_fits,
    require_tensor,
)
from bkcore.core.resolvent import resolvent_diagonal
from bkcore.errors import DTypeError, InputError, ShapeError

__all__ = [
    "BirmanSchwingerOperator",
    "resolvent_apply",
    "spectral_shift",
    "weighted_row_norms",
]


Value = TypeVar("Value", bound=complex | Tensor)

_COUNTABLE = 1e150
"""The largest modulus that Sturm counts accept, and the inverse of the smallest hopping."""


class BirmanSchwingerOperator:
    """`K(z) = |V|^(1/2) (H0 - z)^-1 V^(1/2)`, without its matrix.

    Args:
        v: real potential (..., N), any sign; N >= 1.
        z: complex number, or tensor (..., 1) or (..., N); Im z > 0.
        hopping: number, or real tensor (..., N-1) or (..., 1).
        onsite: diagonal of H0, number or real tensor (..., N) or (..., 1).

    Raises:
        DTypeError: v is not real floating point.
        InputError: Im z <= 0, or an argument is out of the range of `resolvent_diagonal`.
        ShapeError: N = 0, or the shapes do not broadcast.

    Leading dimensions broadcast, so v (N,) and z (M, 1) give M operators. Results are complex64, or
    complex128 for float64 v; real results are float32 or float64 accordingly. Autograd can
    differentiate everything once. But |V|^(1/2) has an infinite slope at V = 0, which affects
    `apply` and not `log_det`.
    """

    def __init__(
        self,
        v: Tensor,
        z: complex | Tensor,
        *,
        hopping: float | Tensor = 1.0,
        onsite: float | Tensor = -2.0,
    ) -> None:
        self._left = resolvent_diagonal(v, z, hopping=hopping, onsite=onsite, causal=True)
        self.v = v.to(self._left.real.dtype)
        self.z = z
        self._free = _sections(v.new_zeros(v.shape[-1:]), z, hopping, onsite)

    def apply(self, x: Tensor) -> Tensor:
        """`K(z) x` in O(N).

        Args:
            x: real or complex (..., N); its leading dimensions broadcast against those of v.

        Returns:
            Complex (..., N).

        Raises:
            DTypeError: x is not a real or complex tensor.
            ShapeError: x does not fit v.
        """
        require_fits("x", x, self._left)
        root = self.v.abs().sqrt()
        return root * _solve(self._free, root * self.v.sgn() * x)

    def __matmul__(self, x: Tensor) -> Tensor:
        """`K @ x` is `K.apply(x)`: it acts on the last dimension of x, a batch of vectors."""
        return self.apply(x)

    def log_det(self) -> Tensor:
        """`log det(1 + K(z)) = log det(H - z) - log det(H0 - z)`, complex, shape (...).

        The determinant of a section is the product of its `1/g_i`. So this is
        `sum_i log(1/g_i) - sum_i log(1/g0_i)` with every argument in (-pi, 0), which is continuous
        in z: its imaginary part is not reduced modulo 2 pi. The determinant itself would overflow.
        Source: Simon, *Trace Ideals*, chapter 3.
        """
        return self._free.left.log().sum(-1) - self._left.log().sum(-1)

    def spectral_shift(self) -> Tensor:
        """Krein's spectral shift at E = Re z, smoothed over eta; real, shape (...).

        `sum_i [arg(1/g_i) - arg(1/g0_i)] / pi` with every argument in (-pi, 0). As eta goes to 0,
        it tends to the integer that the function `spectral_shift` counts, unless E is an eigenvalue
        of H or of H0.
        """
        return self.log_det().imag / math.pi

    def hilbert_schmidt_norm_squared(self) -> Tensor:
        """`||K||_2^2 = sum_ij |V_i| |R0_ij|^2 |V_j|`, exactly and in O(N); real, shape (...)."""
        weights = self.v.abs()
        return (weights * _row_norms(self._free, weights)).sum(-1)

    def hilbert_schmidt_bound(self) -> Tensor:
        """`||V||_2^2 max_i Im (R0)_ii / eta >= ||K||_2^2`; real, shape (...).

        The matrix of `|R0_ij|^2` is symmetric with row sums `Im (R0)_ii / eta` (Ward), and the
        largest of these bounds its norm (Schur's test). With one eta per site, the smallest counts.
        """
        eta = torch.as_tensor(self.z.imag, dtype=self.v.dtype, device=self.v.device)
        eta = eta.amin(-1, keepdim=True) if eta.ndim else eta
        # Adding tiny covers what underflowed. The product is squared last, so its factors do not.
        largest = self._free.diagonal.imag.amax(-1, keepdim=True)
        largest = largest + torch.finfo(largest.dtype).tiny
        return (self.v * (largest / eta).sqrt()).square().sum(-1)


def resolvent_apply(
    v: Tensor,
    z: complex | Tensor,
    source: Tensor,
    *,
    hopping: float | Tensor = 1.0,
    onsite: float | Tensor = -2.0,
) -> Tensor:
    """`(H - z)^-1 source` in O(N), by one sweep from each end.

    Args:
        v: real potential (..., N); N >= 1.
        z: complex number, or tensor (..., 1) or (..., N); Im z > 0.
        source: real or complex (..., N); leading dimensions broadcast against those of v.
        hopping: number, or real tensor (..., N-1) or (..., 1).
        onsite: diagonal of H0, number or real tensor (..., N) or (..., 1).

    Returns:
        Complex (..., N), once differentiable by autograd in every tensor given.

    Raises:
        DTypeError: v is not real floating point.
        InputError: Im z <= 0, or an argument is out of the range of `resolvent_diagonal`.
        ShapeError: N = 0, or the shapes do not broadcast.
    """
    sections = _sections(v, z, hopping, onsite)
    require_fits("source", source, sections.diagonal)
    return _solve(sections, source)


def weighted_row_norms(
    v: Tensor,
    z: complex | Tensor,
    weights: Tensor,
    *,
    hopping: float | Tensor = 1.0,
    onsite: float | Tensor = -2.0,
    causal: bool = False,
) -> Tensor:
    """`sum_j |G_ij|^2 w_j` for every site i, in O(N).

    With all weights 1 it equals `Im G_ii / eta` (the Ward identity) if eta is the same for all
    sites. With weights eta_j it always equals `Im G_ii`.

    Args:
        v: real potential (..., N); N >= 1.
        z: complex number, or tensor (..., 1) or (..., N); Im z > 0.
        weights: real (..., N); leading dimensions broadcast against those of v.
        hopping: number, or real tensor (..., N-1) or (..., 1).
        onsite: diagonal of H0, number or real tensor (..., N) or (..., 1).
        causal: take for row i the resolvent of the first i+1 sites instead of that of all sites.

    Returns:
        Real (..., N). A square below the smallest number of the dtype counts as 0.

    Raises:
        DTypeError: v or weights is not real.
        InputError: Im z <= 0, or an argument is out of the range of `resolvent_diagonal`.
        ShapeError: N = 0, or the shapes do not broadcast.
    """
    require_bool("causal", causal)
    require_tensor("weights", weights)
    if weights.is_complex():
        raise DTypeError(f"weights must be real, not {weights.dtype}")
    if not causal:
        sections = _sections(v, z, hopping, onsite)
        require_fits("weights", weights, sections.diagonal)
        return _row_norms(sections, weights)
    left = resolvent_diagonal(v, z, hopping=hopping, onsite=onsite, causal=True)
    require_fits("weights", weights, left)
    crossing = _modulus2(_crossing(real("hopping", hopping), left[..., :-1]))
    return _modulus2(left) * (weights + _carry(weights, crossing))


def spectral_shift(
    v: Tensor,
    energy: float | Tensor,
    *,
    hopping: float | Tensor = 1.0,
    onsite: float | Tensor = -2.0,
) -> Tensor:
    """Krein's spectral shift `xi(E) = N_H0(E) - N_H(E)` at a real energy, by Sturm counts.

    `N_A(E)` is the number of eigenvalues of A strictly below E. It equals the number of negative
    pivots `q_i = 1/g_i` in the limit eta -> 0 (Sylvester's law of inertia). The count is made in
    float64 and is exact for a matrix within a few units of round-off of H. So it is the true count
    unless an eigenvalue is that close to E (Kahan 1966; Demmel, *Applied Numerical Linear Algebra*,
    section 5.3.4).

    Args:
        v: real potential (..., N); N >= 1.
        energy: real number, or tensor (..., 1) for many energies at once.
        hopping: number, or real tensor (..., N-1) or (..., 1).
        onsite: diagonal of H0, number or real tensor (..., N) or (..., 1).

    Returns:
        int64, shape (...).

    Raises:
        DTypeError: v is complex.
        InputError: an argument is not finite (a count cannot be NaN) or above 1e150, or a hopping
            is below 1e-150 but not 0.
        ShapeError: N = 0, or the shapes do not broadcast.
    """
    free, squares = _shifted_free(v, energy, hopping, onsite)
    return _count_below(free, squares) - _count_below(free + v, squares)


class _Sections(NamedTuple):
    """The factors of all entries of a resolvent.

    left, diagonal: g_i and G_ii, complex (..., N). rightward, leftward: the factors -t_i g_i and
    -t_i r_{i+1} for crossing bond i, complex (..., N-1).
    """

    left: Tensor
    diagonal: Tensor
    rightward: Tensor
    leftward: Tensor


def _sections(
    v: Tensor, z: complex | Tensor, hopping: float | Tensor, onsite: float | Tensor
) -> _Sections:
    left = resolvent_diagonal(v, z, hopping=hopping, onsite=onsite, causal=True)
    hopping, onsite = real("hopping", hopping), real("onsite", onsite)
    right = resolvent_diagonal(
        v.flip(-1), _mirror(z), hopping=_mirror(hopping), onsite=_mirror(onsite), causal=True
    ).flip(-1)
    diagonal = resolvent_diagonal(v, z, hopping=hopping, onsite=onsite)
    return _Sections(
        left, diagonal, _crossing(hopping, left[..., :-1]), _crossing(hopping, right[..., 1:])
    )


def _crossing(hopping: float | Tensor, connected: Tensor) -> Tensor:
    """-t g, in the dtype of g."""
    return (-hopping * connected).to(connected.dtype)


def _mirror(value: Value) -> Value:
    """A number unchanged; a tensor with its last dimension, if it has one, reversed."""
    return cast(Value, value.flip(-1)) if isinstance(value, Tensor) and value.ndim else value


def _solve(sections: _Sections, source: Tensor) -> Tensor:
    source = source.to(torch.promote_types(source.dtype, sections.diagonal.dtype))
    return sections.diagonal * _meet(source, sections.rightward, sections.leftward)


def _row_norms(sections: _Sections, weights: Tensor) -> Tensor:
    reach = _meet(weights, _modulus2(sections.rightward), _modulus2(sections.leftward))
    return _modulus2(sections.diagonal) * reach


def _meet(source: Tensor, rightward: Tensor, leftward: Tensor) -> Tensor:
    """The sum that reaches each site: its own source, and what both sides carry to it."""
    from_right = _carry(source.flip(-1), leftward.flip(-1)).flip(-1)
    return source + _carry(source, rightward) + from_right


def _carry(source: Tensor, factor: Tensor) -> Tensor:
    """`out_0 = 0`, `out_i = factor_{i-1} (source_{i-1} + out_{i-1})`."""
    shape = torch.broadcast_shapes(source.shape[:-1], factor.shape[:-1])
    out = [source.new_zeros(shape, dtype=torch.result_type(source, factor))]
    for s, f in zip(source[..., :-1].unbind(-1), factor.unbind(-1), strict=True):
        out.append(f * (s + out[-1]))
    return torch.stack(out, -1)


def _modulus2(x: Tensor) -> Tensor:
    return x.real.square() + x.imag.square()


def _count_below(diagonal: Tensor, squares: Tensor) -> Tensor:
    """Negative eigenvalues, counted by pivots: diagonal (..., N), squared bonds (..., N-1).

    A pivot of exactly zero counts as a tiny positive one. The next pivot is then hugely negative or
    minus infinity, and together they count once, which is their inertia. If the last pivot is zero,
    zero is an eigenvalue, and it is not counted.
    """
    tiny = torch.finfo(torch.float64).tiny
    pivot = diagonal[..., 0]
    count = (pivot < 0).long()
    for a, t2 in zip(diagonal[..., 1:].unbind(-1), squares.unbind(-1), strict=True):
        pivot = a - t2 / torch.where(pivot == 0, tiny, pivot)
        count = count + (pivot < 0)
    return count


def _shifted_free(
    v: Tensor, energy: float | Tensor, hopping: float | Tensor, onsite: float | Tensor
) -> tuple[Tensor, Tensor]:
    """Diagonal (..., N) and squared bonds (..., N-1) of `H0 - E` in float64, checked."""
    require_tensor("v", v)
    if v.is_complex() or v.dtype == torch.bool:
        raise DTypeError(f"v must be real, not {v.dtype}")
    if v.ndim == 0 or v.shape[-1] == 0:
        raise ShapeError(f"v must be (..., N) with N >= 1, not {tuple(v.shape)}")
    energy, hopping, onsite = (
        torch.as_tensor(real(name, x, v), dtype=torch.float64, device=v.device)
        for name, x in (("energy", energy), ("hopping", hopping), ("onsite", onsite))
    )
    if energy.ndim and energy.shape[-1] != 1:
        raise ShapeError(f"energy must be a number or (..., 1), not {tuple(energy.shape)}")
    free = v.new_zeros(v.shape[-1:], dtype=torch.float64)
    try:
        diagonal = free + onsite - energy
        torch.broadcast_shapes(v.shape, diagonal.shape, (*hopping.shape[:-1], v.shape[-1]))
        squares = hopping.square().expand(*hopping.shape[:-1], v.shape[-1] - 1)
    except RuntimeError as error:
        raise ShapeError(f"v, energy, hopping and onsite do not broadcast: {error}") from None
    if v.is_meta:
        raise InputError("v is on the meta device, so it has no values to count with")
    for name, x in {"v": v, "energy": energy, "hopping": hopping, "onsite": onsite}.items():
        _require_countable(name, x)
    return diagonal, squares


def _require_countable(name: str, x: Tensor) -> None:
    """Raise unless the squares of a pivot's terms are normal float64 numbers or 0."""
    size = x.double().abs()
    bad = ~(size <= _COUNTABLE) | ((size < 1 / _COUNTABLE) & (size > 0) & (name == "hopping"))
    if bool(bad.any()):
        found = x[bad].flatten()[0].item() if x.ndim else x.item()
        raise InputError(
            f"{name} must be finite and at most {_COUNTABLE:.0e}, a hopping 0 or at least "
            f"{1 / _COUNTABLE:.0e}, not {found}; choose other units of energy"
        )
