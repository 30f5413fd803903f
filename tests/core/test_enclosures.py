"""An enclosure contains the exact result of the inputs as they were, whatever became of them.

The oracles are dense complex128 resolvents, whose own round-off `noise` is the only slack; and, for
the round-off of float64 that the radii claim to cover, continued fractions of 50 digits.
"""

import math
from typing import Any

import mpmath  # PyTorch needs sympy, which needs it
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bkcore.core import causal_sweep, oracle, resolvent_attention, resolvent_diagonal
from bkcore.core.attention import AttentionInputs
from bkcore.core.bounds import ward_bound
from bkcore.core.enclosures import (
    Enclosure,
    attention_enclosure,
    diagonal_enclosure,
    propagated_enclosure,
)
from bkcore.errors import DTypeError, InputError, ShapeError

U = torch.finfo(torch.float64).eps / 2

quick = settings(max_examples=25)
seeds = st.integers(0, 2**31)
sizes = st.sampled_from([1, 2, 3, 7, 12, 21])
etas = st.sampled_from([3.0, 1.0, 0.3, 0.05, 0.01, 1e-3])
energies = st.floats(-5.0, 2.0)


def normal(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator)


def rounded(x: Tensor, bits: int, limit: float) -> Tensor:
    """x through codes of a symmetric range, beyond which they clip."""
    step = limit / 2 ** (bits - 1)
    return (x / step).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * step


def with_outliers(x: Tensor, seed: int) -> Tensor:
    return torch.where(normal(seed, *x.shape) > 1.5, 20 * x, x)


def noise(v: Tensor, z: complex, t: Tensor) -> float:
    """Round-off of a dense inverse: condition over the distance from the spectrum."""
    norm = float(v.abs().max()) + 2 + abs(z) + 2 * float(t.abs().max() if t.numel() else 0)
    return 32 * len(v) * U * norm / z.imag**2


# ------------------------------------------------------------------------------------- diagonal


@quick
@given(seeds, sizes, energies, etas, st.booleans(), st.booleans(), st.sampled_from([4, 8]))
def test_the_diagonal_with_its_codes_is_enclosed(
    seed: int, n: int, energy: float, eta: float, causal: bool, one_bond: bool, bits: int
) -> None:
    z, v = complex(energy, eta), with_outliers(normal(seed, n), seed + 1).float()
    t = torch.full((n - 1,), 0.7, dtype=torch.float64) if one_bond else normal(seed + 2, n - 1)
    w = rounded(v, bits, 2.5)
    ball = diagonal_enclosure(v, w, z, hopping=0.7 if one_bond else t, causal=causal)
    exact = (oracle.left_connected if causal else oracle.diagonal)(v, z, hopping=t)
    slack = noise(v.double(), z, t)
    assert ((ball.centre - exact).abs() <= ball.radius + slack).all()
    # What the core makes of it: a float32 sweep, and codes that clip at half the disc.
    G = resolvent_diagonal(w, z, hopping=0.7 if one_bond else t, causal=causal)
    codes = torch.complex(*(rounded(part, bits, 0.25 / eta) for part in (G.real, G.imag)))
    assert ((codes - exact).abs() <= ball.bound(codes) + slack).all()
    # Never more than the disc leaves open.
    assert (ball.radius <= 1 / eta * (1 + 1e-14)).all()


@quick
@given(seeds, st.sampled_from([1, 2, 5, 9]), st.sampled_from([1.0, 0.05, 1e-3, 1e-6]))
def test_the_round_off_of_float64_is_enclosed(seed: int, n: int, eta: float) -> None:
    """Nothing is perturbed: the radius is round-off alone, and the oracle has 50 digits."""
    v, t, b = 3 * normal(seed, n), normal(seed + 1, n), normal(seed + 2, n)
    t[0] = 0
    g, psi, G = precise(v, t, b, eta)
    for causal, exact in ((True, g), (False, G)):
        ball = diagonal_enclosure(v, v, complex(0, eta), hopping=t[1:], onsite=0.0, causal=causal)
        assert encloses(ball, exact)
        if eta >= 1e-3:
            assert ball.radius.max() < 1e-9 / eta**2
    chain: dict[str, Any] = {"energy": 0.0, "eta": eta, "onsite": 0.0, "hopping": t[None, :, None]}
    shaped: list[Any] = [x[None, :, None] for x in (v, b, v, b)]
    for ball, exact in zip(propagated_enclosure(*shaped, **chain), (g, psi), strict=True):
        assert encloses(ball, exact)


def encloses(ball: Enclosure, exact: list[mpmath.mpc]) -> bool:
    centre, radius = ball.centre.flatten().tolist(), ball.radius.flatten().tolist()
    return all(abs(c - x) <= r for c, x, r in zip(centre, exact, radius, strict=True))


def precise(v: Tensor, t: Tensor, b: Tensor, eta: float) -> tuple[list[mpmath.mpc], ...]:
    """g, psi and G with 50 digits; t_i is the bond before site i."""
    with mpmath.workdps(50):
        a = [mpmath.mpc(float(x), -mpmath.mpf(eta)) for x in v]
        hop = [mpmath.mpf(float(x)) for x in t] + [mpmath.mpf(0)]
        n, zero = len(a), mpmath.mpc(0)
        g, psi, r = [zero], [zero], [zero] * (n + 1)
        for i in range(n):
            g.append(1 / (a[i] - hop[i] ** 2 * g[-1]))
            psi.append(g[-1] * (mpmath.mpf(float(b[i])) + hop[i] * psi[-1]))
        for i in reversed(range(n)):
            r[i] = 1 / (a[i] - hop[i + 1] ** 2 * r[i + 1])
        G = [1 / (a[i] - hop[i] ** 2 * g[i] - hop[i + 1] ** 2 * r[i + 1]) for i in range(n)]
        return g[1:], psi[1:], G


def test_a_chain_per_energy() -> None:
    """Broadcasting, and the imaginary part of one z a site."""
    v = normal(0, 3, 8)
    z = torch.tensor([[0.1j], [1j], [2 + 0.5j]])
    ball = diagonal_enclosure(v, v + 0.01, z)
    one = diagonal_enclosure(v[1], v[1] + 0.01, 1j)
    torch.testing.assert_close(ball.radius[1], one.radius, rtol=1e-12, atol=1e-14)
    sites = torch.complex(torch.zeros(8), torch.linspace(0.2, 2.0, 8)).to(torch.complex128)
    ball = diagonal_enclosure(v[0], v[0] + 0.01, sites)
    assert ((ball.centre - oracle.diagonal(v[0], sites)).abs() <= ball.radius).all()


# ----------------------------------------------------------------------------- propagated source


@quick
@given(seeds, sizes, energies, etas, st.booleans(), st.sampled_from([4, 8]))
def test_the_propagated_source_is_enclosed(
    seed: int, n: int, energy: float, eta: float, one_bond: bool, bits: int
) -> None:
    v, b = (with_outliers(normal(seed + k, n), seed + k + 1) for k in (0, 2))
    t = torch.full((n,), -0.8, dtype=torch.float64) if one_bond else normal(seed + 4, n)
    s = t if one_bond else rounded(t, bits, 2.0)
    w, c = rounded(v, bits, 2.5), rounded(b, bits, 2.5)
    shaped = [x[None, :, None] for x in (v, b, w, c)]
    hop = -0.8 if one_bond else t[None, :, None]
    hop_perturbed = None if one_bond else s[None, :, None]
    g, psi = propagated_enclosure(
        *shaped, energy=energy, eta=eta, hopping=hop, hopping_perturbed=hop_perturbed
    )
    z, bonds = complex(energy, eta), t[1:]
    exact_g = oracle.left_connected(v, z, hopping=bonds)[None, :, None]
    exact_psi = oracle.propagated(v, b, z, hopping=bonds)[None, :, None]
    slack = noise(v, z, t)
    assert ((g.centre - exact_g).abs() <= g.radius + slack).all()
    size = float(b.abs().sum())
    assert ((psi.centre - exact_psi).abs() <= psi.radius + slack * size).all()
    if one_bond:
        _, result = causal_sweep(
            *(x.float() for x in shaped[2:]), energy=energy, eta=eta, hopping=-0.8
        )
        assert ((result - exact_psi).abs() <= psi.bound(result) + slack * size).all()


@quick
@given(seeds, sizes, etas, st.floats(1e-3, 3.0))
def test_along_the_chain_is_never_above_ward(seed: int, n: int, eta: float, size: float) -> None:
    """It is the same sum of |G_ij||G'_ij||dv_j|, without the inequality of Cauchy and Schwarz."""
    v = normal(seed, n)
    w = v + size * normal(seed + 1, n)
    zero = torch.zeros(1, n, 1)
    shaped = [v[None, :, None], zero, w[None, :, None], zero]
    g, _ = propagated_enclosure(*shaped, energy=0.0, eta=eta)
    ward = ward_bound(v, w, complex(0, eta), causal=True)
    assert (g.radius[0, :, 0] <= ward * (1 + 1e-9) + 1e-10 / eta**2).all()


@quick
@given(seeds, st.integers(1, 12), etas)
def test_it_is_exact_for_one_perturbed_site(seed: int, n: int, eta: float) -> None:
    """|g'_i - g_i| = |G_ij| |dv_j| |G'_ij|, in modulus."""
    v, zero = normal(seed, n), torch.zeros(1, n, 1)
    w = v.clone()
    w[seed % n] += 0.5
    g, _ = propagated_enclosure(
        v[None, :, None], zero, w[None, :, None], zero, energy=-2.0, eta=eta
    )
    error = (g.centre[0, :, 0] - oracle.left_connected(v, complex(-2, eta))).abs()
    slack = 4 * noise(v, complex(0, eta), torch.ones(1)) * (1 + 1 / eta)
    assert (g.radius[0, :, 0] - error).abs().max() <= slack


# --------------------------------------------------------------------------------------- attention


def attention_problem(seed: int, sites: int, barrier: float) -> AttentionInputs:
    query, key = normal(seed, 1, sites, 2, 3), normal(seed + 1, 1, sites, 2, 3)
    value = with_outliers(normal(seed + 2, 1, sites, 2, 4), seed + 3)
    hopping = torch.exp(-0.3 * normal(seed + 4, 1, sites, 2).abs())
    potential = barrier * normal(seed + 5, 1, sites, 2)
    return AttentionInputs(query, key, value, hopping, potential)


def dense_attention(inputs: AttentionInputs, eta: Tensor) -> tuple[Tensor, Tensor]:
    """out and g from the inverses of L L^T + diag(potential) - i eta, first sites only."""
    query, key, value, t, potential = (x[0] for x in inputs)
    out = torch.zeros(value.shape, dtype=torch.complex128)
    green = torch.zeros(t.shape, dtype=torch.complex128)
    for h in range(t.shape[1]):
        lower = torch.eye(len(t), dtype=torch.float64) - torch.diag(t[1:, h], -1)
        shifted = lower @ lower.T + torch.diag(potential[:, h] - 1j * eta[h])
        for i in range(len(t)):
            row = torch.linalg.inv(shifted[: i + 1, : i + 1])[i]
            green[i, h] = row[-1]
            scores = (key[: i + 1, h] @ query[i, h]).to(row.dtype)
            out[i, h] = (row * scores) @ value[: i + 1, h].to(row.dtype)
    return out[None], green[None]


@quick
@given(
    seeds,
    st.sampled_from([1, 2, 5, 11]),
    st.sampled_from([1.0, 0.05, 1e-4]),
    st.sampled_from([0.0, 0.1, 1.0]),
    st.sampled_from([4, 8]),
)
def test_attention_is_enclosed(
    seed: int, sites: int, eta: float, barrier: float, bits: int
) -> None:
    exact = attention_problem(seed, sites, barrier)
    used = AttentionInputs(*(rounded(x, bits, 1.5) for x in exact))  # much of it clips
    width = torch.tensor([eta, 2 * eta], dtype=torch.float64)
    g, real, imag, memory = attention_enclosure(exact, used, width)
    out, green = dense_attention(exact, width)
    norm = 4 + float(exact.potential.abs().max())
    slack = 32 * sites * U * norm / eta**2
    scale = float(exact.query.abs().sum() * exact.key.abs().sum() * exact.value.abs().max())
    assert ((g.centre - green).abs() <= g.radius + slack).all()
    assert ((real.centre - out.real).abs() <= real.radius + slack * scale).all()
    assert ((imag.centre - out.imag).abs() <= imag.radius + slack * scale).all()
    assert ((memory.centre - green.imag / width).abs() <= memory.radius + slack / width).all()
    # The centre is what attention makes of the inputs that are used; float32 is bounded, too.
    inputs: list[Any] = [x.float() for x in (*used, width)]
    result, _, _ = resolvent_attention(*inputs)
    assert (real.bound(result.real) >= (result.real - out.real).abs() - slack * scale).all()


def test_a_hopping_hardly_moves_g() -> None:
    """Without a potential g stays 1, whatever the bonds: c_i carries 1 - g', not 1."""
    exact = attention_problem(0, 40, 0.0)
    moved = exact._replace(hopping=exact.hopping * 0.9)
    g, real, _, _ = attention_enclosure(exact, moved, torch.full((2,), 1e-9, dtype=torch.float64))
    assert g.radius.max() < 1e-7
    assert real.radius[:, 1:].min() > 0


def test_the_imaginary_part_has_a_bound_of_its_own_order() -> None:
    exact = attention_problem(1, 20, 0.0)
    used = AttentionInputs(*(rounded(x, 8, 4.0) for x in exact))
    _, real, imag, _ = attention_enclosure(exact, used, torch.full((2,), 1e-6, dtype=torch.float64))
    assert imag.radius.mean() < 1e-4 * real.radius.mean()


def test_attention_of_the_same_inputs_is_enclosed_to_round_off() -> None:
    exact = attention_problem(2, 30, 0.1)
    exact = exact._replace(potential=exact.potential.abs())
    balls = attention_enclosure(exact, exact, torch.full((2,), 1e-3, dtype=torch.float64))
    assert all(ball.radius[:, 1:].min() > 0 and ball.radius.max() < 1e-9 for ball in balls)


# ------------------------------------------------------------------------------------------ errors

X = torch.zeros(1, 3, 2)


def test_errors_name_what_is_wrong() -> None:
    inputs = attention_problem(0, 3, 0.0)
    width = torch.ones(2, dtype=torch.float64)
    with pytest.raises(InputError, match="eta"):
        attention_enclosure(inputs, inputs, -width)
    with pytest.raises(DTypeError, match="query"):
        attention_enclosure(inputs, inputs._replace(query=inputs.query + 0j), width)
    with pytest.raises(ShapeError, match="key"):
        attention_enclosure(inputs, inputs._replace(key=inputs.key[:, :2]), width)
    with pytest.raises(ShapeError, match="same shapes"):
        attention_enclosure(inputs, AttentionInputs(*(x[:, :2] for x in inputs)), width)
    with pytest.raises(ShapeError, match=r"\(B, N, H\)"):
        propagated_enclosure(X, X[:, :2], X, X, energy=0.0, eta=1.0)
    with pytest.raises(ShapeError, match="hopping"):
        propagated_enclosure(X, X, X, X, energy=0.0, eta=1.0, hopping=torch.ones(5))
    with pytest.raises(InputError, match="eta"):
        propagated_enclosure(X, X, X, X, energy=0.0, eta=0.0)
    with pytest.raises(InputError, match="Im z"):
        diagonal_enclosure(X, X, 1.0 + 0j)


def test_nan_says_that_nothing_is_known() -> None:
    v = torch.tensor([0.0, math.nan, 0.0])
    assert diagonal_enclosure(v, v, 1j).radius.isnan().all()
    shaped = v[None, :, None]
    g, psi = propagated_enclosure(shaped, shaped, shaped, shaped, energy=0.0, eta=1.0)
    assert g.radius.isnan().flatten().tolist() == [False, True, True]
    assert psi.radius.isnan().flatten().tolist() == [False, True, True]
