"""The identities of K(z), each against a dense matrix or against LAPACK's eigenvalues.

The tolerances are those of `tests.core.chains`.
"""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.linalg import eigvalsh_tridiagonal
from torch import Tensor

from bkcore.core.operator import (
    BirmanSchwingerOperator,
    resolvent_apply,
    spectral_shift,
    weighted_row_norms,
)
from bkcore.errors import DTypeError, InputError, ShapeError
from tests.core.chains import (
    FEW,
    U,
    bonds,
    dense,
    energies,
    etas,
    forward,
    matrix_of,
    potential,
    quick,
    resolvent,
    seeds,
    sigmas,
    sizes,
    vector,
)

# ---------------------------------------------------------------- (H - z)^-1 applied to a vector


@quick
@given(seeds, sizes, sigmas, energies, etas)
def test_resolvent_apply_is_the_dense_solve(
    seed: int, n: int, sigma: float, energy: float, eta: float
) -> None:
    v, t, b, z = potential(seed, n, sigma), bonds(seed, n), vector(seed, n), complex(energy, eta)
    expected = resolvent(v, z, t) @ b
    error = (resolvent_apply(v, z, b, hopping=t) - expected).norm()
    assert error <= forward(v, z, t) * b.norm() / eta


def test_resolvent_apply_keeps_its_digits_where_leading_sections_are_singular() -> None:
    # At the band centre every leading section of odd length has an eigenvalue at E, so g reaches
    # 1/eta = 1e12 while G stays below 40. Backward stability means a residual of a few U whatever
    # eta is; the Thomas algorithm leaves 5e-6 here.
    n, eta = 40, 1e-12
    z, b = complex(-2.0, eta), vector(3, n)
    v, t = torch.zeros(n, dtype=torch.float64), torch.ones(n - 1, dtype=torch.float64)
    x = resolvent_apply(v, z, b)
    residual = dense(v, t).to(x.dtype) @ x - z * x - b
    assert residual.norm() <= FEW * U * (4.0 * x.norm() + b.norm())


def test_resolvent_apply_broadcasts_and_takes_real_sources() -> None:
    v = torch.stack([potential(s, 9, 1.0) for s in range(3)])
    b = torch.stack([vector(s, 9).real for s in range(2)])[:, None]
    out = resolvent_apply(v, 0.3 + 0.5j, b)
    assert out.shape == (2, 3, 9)
    assert out.dtype == torch.complex128
    torch.testing.assert_close(out[1, 2], resolvent_apply(v[2], 0.3 + 0.5j, b[1, 0]))


def test_resolvent_apply_in_single_precision() -> None:
    v, b = potential(0, 16, 1.0), vector(0, 16)
    hopping = torch.ones(15, dtype=torch.float64)  # parameters take the dtype of v
    out = resolvent_apply(v.float(), 0.5j, b.to(torch.complex64), hopping=hopping)
    assert out.dtype == torch.complex64
    assert BirmanSchwingerOperator(v.half(), 0.5j).apply(out).dtype == torch.complex64
    expected = resolvent_apply(v, 0.5j, b)
    tolerance = forward(v, 0.5j, torch.ones(15)) * 2.0**29  # single round-off over double
    assert (out - expected).norm() <= tolerance * b.norm() / 0.5


def test_resolvent_apply_has_exact_gradients() -> None:
    v, t, b = potential(1, 6, 1.0), bonds(1, 6), vector(1, 6)

    z = torch.tensor([-1.3 + 0.4j], dtype=torch.complex128)

    def solve(v: Tensor, z: Tensor, t: Tensor, b: Tensor) -> Tensor:
        return resolvent_apply(v, z, b, hopping=t)

    inputs = [x.clone().requires_grad_() for x in (v, z, t, b)]
    assert torch.autograd.gradcheck(solve, inputs)


# ------------------------------------------------------------------------------ K(z) as a matrix


@quick
@given(seeds, sizes, sigmas, energies, etas)
def test_apply_is_the_definition(
    seed: int, n: int, sigma: float, energy: float, eta: float
) -> None:
    v, t, z = potential(seed, n, sigma), bonds(seed, n), complex(energy, eta)
    root = v.abs().sqrt()
    expected = root[:, None] * resolvent(0 * v, z, t) * (v.sgn() * root)
    K = BirmanSchwingerOperator(v, z, hopping=t)
    error = (matrix_of(K.apply, n) - expected).norm()
    # K is R0 between two roots of |V|: the solve's tolerance, column by column.
    assert error <= forward(v, z, t) * math.sqrt(n) * v.abs().max() / eta


def test_matmul_is_apply() -> None:
    v, x = potential(0, 12, 1.0), torch.stack([vector(s, 12) for s in range(3)])
    K = BirmanSchwingerOperator(v, 0.7j)
    assert torch.equal(K @ x, K.apply(x))


@quick
@given(seeds, sizes, sigmas, energies, etas)
def test_the_resolvent_of_H_from_that_of_H0(
    seed: int, n: int, sigma: float, energy: float, eta: float
) -> None:
    """(H - z)^-1 = R0 - R0 V^(1/2) (1 + K)^-1 |V|^(1/2) R0."""
    v, t, z = potential(seed, n, sigma), bonds(seed, n), complex(energy, eta)
    root = v.abs().sqrt()
    free = matrix_of(lambda x: resolvent_apply(0 * v, z, x, hopping=t), n)
    K = matrix_of(BirmanSchwingerOperator(v, z, hopping=t).apply, n)
    inner = torch.linalg.inv(torch.eye(n, dtype=K.dtype) + K)
    composed = free - (free * (v.sgn() * root)) @ inner @ (root[:, None] * free)
    # (1 + K)^-1 = 1 - |V|^(1/2) G V^(1/2) is at most 1 + max|v|/eta in norm, and inverting it
    # multiplies the solve's relative error by its condition number.
    strength = 1.0 + float(v.abs().max()) / eta
    tolerance = forward(v, z, t) * math.sqrt(n) * strength**3 / eta
    assert (composed - resolvent(v, z, t)).norm() <= tolerance


# ----------------------------------------------------------------------------------- determinant


@quick
@given(seeds, sizes, sigmas, energies, etas)
def test_log_det_is_the_sum_over_eigenvalues(
    seed: int, n: int, sigma: float, energy: float, eta: float
) -> None:
    """log det(H - z) = sum_k log(E_k - z): real part, and argument without a modulus of 2 pi.

    sum_i arg(1/g_i) and sum_k arg(E_k - z) agree modulo 2 pi, both are continuous in eta, and both
    tend to -n pi / 2 as eta grows: they are equal.
    """
    v, t, z = potential(seed, n, sigma), bonds(seed, n), complex(energy, eta)
    expected = 0.0 + 0.0j
    for sign, diagonal in ((1, v - 2.0), (-1, 0 * v - 2.0)):
        levels = eigvalsh_tridiagonal(diagonal.numpy(), t.numpy()) if n > 1 else diagonal.numpy()
        expected += sign * np.log(levels - z).sum()
    # d log det / d a_i = G_ii <= 1/eta: a backward error of a few U of the norm at each of n sites.
    error = abs(complex(BirmanSchwingerOperator(v, z, hopping=t).log_det()) - expected)
    assert error <= n * forward(v, z, t)


@quick
@given(seeds, sizes, energies, etas)
def test_log_det_is_the_determinant_of_one_plus_K(
    seed: int, n: int, energy: float, eta: float
) -> None:
    v, z = potential(seed, n, 1.0), complex(energy, eta)
    operator = BirmanSchwingerOperator(v, z)
    K = matrix_of(operator.apply, n)
    expected = torch.linalg.det(torch.eye(n, dtype=K.dtype) + K)
    # As above, and K's own error times the derivative tr (1+K)^-1 dK of the logarithm.
    strength = 1.0 + float(v.abs().max()) / eta
    tolerance = n * forward(v, z, torch.ones(n)) * strength**2
    assert abs(complex(operator.log_det().exp() / expected) - 1.0) <= tolerance


def test_log_det_stays_finite_where_the_determinant_overflows() -> None:
    n = 4000
    v = 50.0 + potential(0, n, 1.0)
    value = BirmanSchwingerOperator(v, 1j).log_det()
    assert value.real > 1e4  # log of the greatest double: 710
    assert torch.isfinite(value.real)


def test_log_det_differentiates_to_the_diagonal_of_the_resolvent() -> None:
    """d log det(H - z) / dv_i = G_ii, Jacobi's formula; a test of value and gradient at once."""
    v, z = potential(2, 10, 1.0).requires_grad_(), 0.2 + 0.3j
    BirmanSchwingerOperator(v, z).log_det().real.backward()
    G = resolvent(v.detach(), z, torch.ones(9, dtype=torch.float64))
    torch.testing.assert_close(v.grad, G.diagonal().real, rtol=1e-12, atol=1e-12)


def test_minus_one_is_an_eigenvalue_of_K_exactly_at_the_levels_of_H() -> None:
    """E outside the spectrum of H0, where K(E + i eta) is within O(eta) of K(E)."""
    n, eta = 20, 1e-10
    v = 4.0 * potential(5, n, 1.0)
    levels = eigvalsh_tridiagonal((v - 2.0).numpy(), np.ones(n - 1))
    outside = [float(e) for e in levels if not -4.5 < e < 0.5]
    assert len(outside) >= 5

    def distance(energy: float) -> float:
        K = matrix_of(BirmanSchwingerOperator(v, complex(energy, eta)).apply, n)
        return float((torch.linalg.eigvals(K) + 1.0).abs().min())

    # ||dK/dz|| <= max|v| / dist(E, spectrum of H0)^2 <= 4 max|v|, an eigenvalue of K moves by
    # that times eta times its condition (taken as 100); the eigenvalue solver adds about 1e-13.
    for energy in outside:
        assert distance(energy) <= 400.0 * float(v.abs().max()) * eta
    # (1 + K)^-1 = 1 - |V|^(1/2) (H-E)^-1 V^(1/2), so no eigenvalue of 1 + K is smaller than
    # 1 / (1 + max|v| / dist(E, spectrum of H)); half of it leaves room for eta.
    for energy in (levels[0] - 1.0, levels[-1] + 1.0, *(np.add(outside[1:], outside[:-1]) / 2)):
        gap = float(np.abs(levels - energy).min())
        if not -4.5 < energy < 0.5:
            assert distance(float(energy)) >= 0.5 / (1.0 + float(v.abs().max()) / gap)


# ---------------------------------------------------------------------------- Hilbert-Schmidt norm


@quick
@given(seeds, sizes, sigmas, energies, etas)
def test_hilbert_schmidt_norm_and_its_bound(
    seed: int, n: int, sigma: float, energy: float, eta: float
) -> None:
    v, t, z = potential(seed, n, sigma), bonds(seed, n), complex(energy, eta)
    K = BirmanSchwingerOperator(v, z, hopping=t)
    exact = float(K.hilbert_schmidt_norm_squared())
    expected = float((v.abs().outer(v.abs()) * resolvent(0 * v, z, t).abs().square()).sum())
    bound = float(K.hilbert_schmidt_bound())
    # Sums of positive terms, whose moduli are relative to ||R0|| <= 1/eta as a solve's entries are.
    assert abs(exact - expected) <= 2 * forward(v, z, t) * float(v.abs().sum() / eta) ** 2
    assert exact <= bound * (1 + forward(v, z, t))


@quick
@given(seeds, sizes, sigmas, energies, etas, st.booleans())
def test_weighted_row_norms_are_the_dense_ones(
    seed: int, n: int, sigma: float, energy: float, eta: float, causal: bool
) -> None:
    v, t, z = potential(seed, n, sigma), bonds(seed, n), complex(energy, eta)
    w = vector(seed, n).real
    rows = resolvent(v, z, t)
    if causal:
        for i in range(n):
            rows[i] = 0
            rows[i, : i + 1] = resolvent(v[: i + 1], z, t[:i])[i]
    expected = rows.abs().square() @ w
    error = (weighted_row_norms(v, z, w, hopping=t, causal=causal) - expected).abs().max()
    # An entry is off by `forward` of 1/eta, its square by twice that of 1/eta^2, n of them summed.
    assert error <= 2 * forward(v, z, t) * w.abs().sum() / eta**2


# ---------------------------------------------------------------------------------- whole systems


@pytest.mark.parametrize("strength", [-3.0, -0.5, 1.0, 4.0])
def test_one_impurity_binds_at_sqrt_four_plus_v_squared(strength: float) -> None:
    """Infinite chain, t = 1: one level at -2 + sgn(v) sqrt(4 + v^2), outside the band."""
    n, delta = 401, 1e-9
    v = torch.zeros(n, dtype=torch.float64)
    v[n // 2] = strength
    bound_state = -2.0 + math.copysign(math.sqrt(4.0 + strength**2), strength)
    # The ends, 200 sites away, shift the level by exp(-400 kappa), sinh kappa = |v|/2: at most
    # exp(-99). It crosses inside (E - delta, E + delta): the count below drops by one.
    around = torch.tensor([[bound_state - delta], [bound_state + delta]], dtype=torch.float64)
    below, above = spectral_shift(v, around)
    assert int(above - below) == -1
    assert sorted([int(below), int(above)]) == ([-1, 0] if strength < 0 else [0, 1])
    # and there K, of rank one, has the eigenvalue v (R0)_cc = -1, up to O(eta / v).
    K = BirmanSchwingerOperator(v, complex(bound_state, 1e-10))
    site = torch.zeros(n, dtype=torch.complex128)
    site[n // 2] = 1.0
    assert torch.allclose(K @ site, -site, rtol=0.0, atol=1e-8)


def test_a_long_chain_does_not_overflow() -> None:
    # Off the band the u v^T generators of the inverse grow like e^(kappa n), far beyond 1e308.
    n, z = 20_000, 3.0 + 0.1j
    v, b = potential(0, n, 1.0), vector(0, n)
    x = resolvent_apply(0 * v, z, b)
    product = (-2.0 - z) * x
    product[1:] += x[:-1]
    product[:-1] += x[1:]
    assert (product - b).abs().max() <= FEW * U * (abs(z) + 4.0) * b.abs().max() / z.imag
    assert torch.isfinite(torch.view_as_real(BirmanSchwingerOperator(v, z) @ b)).all()


def test_a_batch_of_potentials_is_its_rows() -> None:
    v = torch.stack([potential(s, 13, 1.0) for s in range(3)])
    x, z = vector(0, 13), 0.1 + 0.6j
    K = BirmanSchwingerOperator(v, z)
    row = BirmanSchwingerOperator(v[1], z)
    assert K.log_det().shape == (3,)
    for whole, part in (
        (K @ x, row @ x),
        (K.log_det(), row.log_det()),
        (K.spectral_shift(), row.spectral_shift()),
        (K.hilbert_schmidt_norm_squared(), row.hilbert_schmidt_norm_squared()),
        (K.hilbert_schmidt_bound(), row.hilbert_schmidt_bound()),
    ):
        torch.testing.assert_close(whole[1], part, rtol=1e-13, atol=1e-13)


def test_energies_and_sites_may_differ() -> None:
    """z (M, 1) makes M operators; z and on-site energy per site, bonds unlike, one eta each."""
    v, x, t = potential(0, 7, 1.0), vector(0, 7), bonds(0, 7)
    z = torch.tensor([[0.1 + 0.6j], [-2.0 + 0.3j]], dtype=torch.complex128)
    K = BirmanSchwingerOperator(v, z, hopping=t)
    row = BirmanSchwingerOperator(v, -2.0 + 0.3j, hopping=t)
    torch.testing.assert_close((K @ x)[1], row @ x, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(K.log_det()[1], row.log_det(), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(K.hilbert_schmidt_bound()[1], row.hilbert_schmidt_bound())

    onsite = potential(9, 7, 3.0)
    z = torch.complex(potential(8, 7, 1.0), 0.3 + potential(7, 7, 1.0).abs())
    matrix = dense(v + onsite + 2.0, t) - torch.diag(z)
    out = resolvent_apply(v, z, x, hopping=t, onsite=onsite)
    torch.testing.assert_close(matrix @ out, x, rtol=1e-13, atol=1e-13)
    rows = weighted_row_norms(v, z, z.imag, hopping=t, onsite=onsite)
    diagonal = torch.linalg.inv(matrix).diagonal().imag  # sum_j eta_j |G_ij|^2 = Im G_ii
    torch.testing.assert_close(rows, diagonal, rtol=1e-12, atol=1e-12)


def test_hilbert_schmidt_bound_takes_the_least_eta() -> None:
    # Two sites without a bond; the impurity is alone, so that the bound is reached: (1 / 0.1)^2.
    v = torch.tensor([1.0, 0.0], dtype=torch.float64)
    z = torch.tensor([0.1j, 10j], dtype=torch.complex128)
    K = BirmanSchwingerOperator(v, z, hopping=0.0, onsite=0.0)
    expected = torch.tensor(100.0, dtype=torch.float64)
    torch.testing.assert_close(K.hilbert_schmidt_norm_squared(), expected)
    torch.testing.assert_close(K.hilbert_schmidt_bound(), expected)


# ----------------------------------------------------------------------------------------- errors

V = torch.zeros(5, dtype=torch.float64)


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda: BirmanSchwingerOperator(V + 0j, 1j), DTypeError),
        (lambda: BirmanSchwingerOperator(V, 1.0 + 0j), InputError),
        (lambda: BirmanSchwingerOperator(V, 1.0 - 1j), InputError),
        (lambda: BirmanSchwingerOperator(V, 1j, hopping=torch.ones(5)), ShapeError),
        (lambda: BirmanSchwingerOperator(V, 1j) @ torch.ones(4), ShapeError),
        (lambda: BirmanSchwingerOperator(torch.zeros(2, 5), 1j) @ torch.ones(3, 5), ShapeError),
        (lambda: resolvent_apply(V + 0j, 1j, V), DTypeError),
        (lambda: resolvent_apply(V, 1.0 + 0j, V), InputError),
        (lambda: resolvent_apply(V, 1j, torch.tensor(1.0)), ShapeError),
        (lambda: weighted_row_norms(V, 1j, V + 0j), DTypeError),
        (lambda: weighted_row_norms(V, 1j, V[:-1], causal=True), ShapeError),
        (lambda: spectral_shift(V + 0j, 0.0), DTypeError),
        (lambda: spectral_shift(V[:0], 0.0), ShapeError),
        (lambda: spectral_shift(V, 0.0, hopping=torch.ones(5)), ShapeError),
        (lambda: spectral_shift(V, torch.zeros(5)), ShapeError),
        (lambda: spectral_shift(torch.zeros(2, 5), torch.zeros(3, 1)), ShapeError),
        (lambda: spectral_shift(V * math.nan, 0.0), InputError),
        (lambda: spectral_shift(V, math.inf), InputError),
    ],
)
def test_errors_name_what_is_wrong(call: Callable[[], object], error: type[Exception]) -> None:
    with pytest.raises(error):
        call()
