"""The bounds must hold for every potential, and some of them are equalities somewhere.

`U` is the unit round-off. A computed diagonal belongs to a potential within a few
U (|a_i| + |z| + t^2 |g|) of the one given, so by the bounds themselves it is off by at most
U norm / eta^2: `noise` is that with a small factor, the only slack an inequality gets here.
"""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bkcore.core import attention, bounds, enclosures
from bkcore.core.bounds import (
    contraction_factor,
    disc_range,
    in_disc,
    maximum_bound,
    uniform_bound,
    ward_bound,
)
from bkcore.core.operator import weighted_row_norms
from bkcore.core.resolvent import resolvent_diagonal
from bkcore.errors import DTypeError, InputError

U = torch.finfo(torch.float64).eps / 2

quick = settings(max_examples=40)
sizes = st.integers(1, 32)
seeds = st.integers(0, 2**31)
etas = st.floats(0.05, 3.0)
energies = st.floats(-6.0, 2.0)
sigmas = st.sampled_from([0.0, 0.1, 1.0, 10.0])


def normal(seed: int, n: int) -> Tensor:
    return torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def noise(v: Tensor, z: complex, t: Tensor | None = None) -> float:
    hop = 1.0 if t is None or not t.numel() else float(t.square().max())
    return 16 * U * (float(v.abs().max()) + 2.0 + abs(z) + hop / z.imag) / z.imag**2


def hyperbolic_distance(a: Tensor, b: Tensor) -> Tensor:
    """In the upper half-plane, accurate for neighbours too."""
    return 2.0 * ((a - b).abs() / (2.0 * (a.imag * b.imag).sqrt())).asinh()


# ------------------------------------------------------------------------------------------- disc


@quick
@given(seeds, sizes, sigmas, energies, etas, st.booleans())
def test_every_green_function_lies_in_the_disc(
    seed: int, n: int, sigma: float, energy: float, eta: float, causal: bool
) -> None:
    v, t = sigma * normal(seed, n), 1.5 * normal(seed + 1, n - 1)
    G = resolvent_diagonal(v, complex(energy, eta), hopping=t, causal=causal)
    assert in_disc(G, eta).all()
    (re_low, re_high), (im_low, im_high) = disc_range(eta)
    # A point of the disc, up to the 16 units in_disc grants.
    slack = 16 * U / eta
    assert re_low - slack <= G.real.min()
    assert G.real.max() <= re_high + slack
    assert im_low <= G.imag.min()
    assert G.imag.max() <= im_high + slack


def test_disc_range_is_reached() -> None:
    """One site: G = 1 / (a - z) runs along the circle itself."""
    eta = 0.25
    (re_low, re_high), (im_low, im_high) = disc_range(eta)
    v = torch.tensor([[eta], [-eta], [0.0], [1e9]], dtype=torch.float64)
    G = resolvent_diagonal(v, complex(0.0, eta), onsite=0.0)[:, 0]
    assert in_disc(G, eta).all()
    expected = torch.tensor([re_high, re_low, 0.0, 0.0], dtype=torch.float64)
    torch.testing.assert_close(G.real, expected, rtol=1e-15, atol=2e-9)
    expected = torch.tensor([im_high / 2, im_high / 2, im_high, im_low], dtype=torch.float64)
    torch.testing.assert_close(G.imag, expected, rtol=1e-15, atol=2e-9)


def test_disc_range_per_channel() -> None:
    eta = torch.tensor([0.5, 2.0])
    (re_low, re_high), (im_low, im_high) = disc_range(eta)
    assert torch.equal(re_high, torch.tensor([1.0, 0.25]))
    assert torch.equal(re_low, -re_high)
    assert torch.equal(im_high, torch.tensor([2.0, 0.5]))
    assert torch.equal(im_low, torch.zeros(2))
    assert in_disc(torch.tensor([1.9j, 1.9j]), eta).tolist() == [True, False]


def test_what_lies_outside_the_disc() -> None:
    eta = 0.5
    centre = 1j / (2 * eta)
    angles = torch.linspace(0, 2 * math.pi, 9, dtype=torch.float64)
    circle = torch.polar(torch.full_like(angles, 1 / (2 * eta)), angles)
    assert not in_disc(centre + 1.001 * circle, eta).any()
    assert in_disc(centre + 0.999 * circle, eta).all()
    # A code that rounds Im to 0 leaves the disc however small Re is; 0 itself does not.
    codes = torch.tensor([0.3 + 0j, 1e-9 + 0j, 0j, complex(math.nan, 1.0), -0.1j])
    assert in_disc(codes, eta).tolist() == [False, False, True, False, False]
    assert in_disc(torch.tensor([2.02j]), eta, tolerance=0.02).all()


# ------------------------------------------------------------------------------------ contraction


@quick
@given(seeds, st.floats(-3.0, 3.0), energies, etas)
def test_a_left_step_contracts_hyperbolic_distance(
    seed: int, hopping: float, energy: float, eta: float
) -> None:
    """Two pasts, one present: the last site's potential is shared, the earlier ones are not."""
    v = normal(seed, 60).reshape(20, 3)
    other = normal(seed + 1, 60).reshape(20, 3)
    other[:, -1] = v[:, -1]
    z = complex(energy, eta)
    g, h = (resolvent_diagonal(x, z, hopping=hopping, causal=True) for x in (v, other))
    before, after = hyperbolic_distance(g[:, 1], h[:, 1]), hyperbolic_distance(g[:, 2], h[:, 2])
    # Each state carries a few U of the numbers it is computed from, relative to its own Im.
    scale = float(torch.stack([1 / g.imag, 1 / h.imag]).max()) / eta
    slack = 64 * U * scale * (2.0 + abs(z) + hopping**2 / eta + 5.0)
    assert (after <= contraction_factor(hopping, eta) * before + slack).all()


def test_the_contraction_factor_is_reached() -> None:
    """By neighbouring states at the top i / eta of the disc, where the shift by eta does most."""
    eta, hopping = 1.0, 1.0
    g = torch.tensor([1j / eta, 0.999j / eta], dtype=torch.complex128)
    step = 1.0 / (0.3 - 1j * eta - hopping**2 * g)
    ratio = hyperbolic_distance(step[0], step[1]) / hyperbolic_distance(g[0], g[1])
    factor = contraction_factor(hopping, eta)
    assert factor == 0.5
    # The states differ by 0.1 %, the ratio from the infinitesimal one by about half of that.
    assert 0.999 * factor <= ratio <= factor


# --------------------------------------------------------------------------------- Ward's identity


@quick
@given(seeds, sizes, sigmas, energies, etas, st.booleans())
def test_ward_identity(
    seed: int, n: int, sigma: float, energy: float, eta: float, causal: bool
) -> None:
    """sum_j |G_ij|^2 = Im G_ii / eta, for all sites and for the first i+1."""
    v, t, z = sigma * normal(seed, n), 1.5 * normal(seed + 1, n - 1), complex(energy, eta)
    G = resolvent_diagonal(v, z, hopping=t, causal=causal)
    rows = weighted_row_norms(v, z, torch.ones_like(v), hopping=t, causal=causal)
    # Both sides are smooth in G, of size 1/eta^2, with slope 2/eta.
    assert (rows - G.imag / eta).abs().max() <= 4 * noise(v, z, t) / eta


@quick
@given(seeds, sizes, sigmas, energies, etas, st.floats(1e-4, 3.0), st.booleans())
def test_the_bounds_hold_and_are_ordered(
    seed: int, n: int, sigma: float, energy: float, eta: float, size: float, causal: bool
) -> None:
    v, t, z = sigma * normal(seed, n), 1.5 * normal(seed + 1, n - 1), complex(energy, eta)
    dv = size * normal(seed + 2, n)
    dv[normal(seed + 3, n) > 1.5] *= 30.0  # outliers
    w = v + dv
    G, H = (resolvent_diagonal(x, z, hopping=t, causal=causal) for x in (v, w))
    error = (H - G).abs()
    weighted = ward_bound(v, w, z, hopping=t, causal=causal)
    site = maximum_bound(w - v, G, H, eta)
    uniform = uniform_bound(w - v, eta)
    slack = noise(v, z, t) + noise(w, z, t)
    relative = 1.0 + (slack + 64 * U) * eta**2 * (1.0 + float(dv.abs().max()) / eta)
    assert (error <= weighted * relative + slack).all()
    assert (weighted <= site * relative + slack * float(uniform) * eta).all()
    assert (site <= uniform * relative).all()
    assert uniform.shape == (1,)


@quick
@given(seeds, st.integers(1, 24), energies, etas, st.floats(-20.0, 20.0), st.booleans())
def test_the_weighted_bound_is_exact_for_one_perturbed_site(
    seed: int, n: int, energy: float, eta: float, change: float, causal: bool
) -> None:
    """|G'_ii - G_ii| = |G_ij| |dv_j| |G'_ij|: nothing is lost to Cauchy-Schwarz."""
    v, z = normal(seed, n), complex(energy, eta)
    w = v.clone()
    w[seed % n] += change
    error = (
        resolvent_diagonal(w, z, causal=causal) - resolvent_diagonal(v, z, causal=causal)
    ).abs()
    # |G_ij| and |G'_ij| are each known to `noise`, and are multiplied by |dv| / eta at most.
    tolerance = 4 * (noise(v, z) + noise(w, z)) * (1.0 + abs(change) / eta)
    assert (error - ward_bound(v, w, z, causal=causal)).abs().max() <= tolerance


def test_the_causal_bound_looks_only_back() -> None:
    v, w = normal(0, 12), normal(0, 12)
    w[7] += 0.5
    bound = ward_bound(v, w, 0.5j, causal=True)
    assert torch.equal(bound[:7], torch.zeros(7, dtype=torch.float64))
    assert (bound[7:] > 0).all()
    assert (ward_bound(v, w, 0.5j)[:7] > 0).all()


def test_the_weighted_bound_ignores_far_outliers() -> None:
    """What the weights are for: at eta = 1 a site 40 bonds away hardly matters."""
    v, w = normal(1, 64), normal(1, 64) + 0.01
    w[60] += 50.0
    G, H = (resolvent_diagonal(x, 1j) for x in (v, w))
    # Entries of G fall off by a factor of at least sqrt(contraction) = 0.71 a bond on average, so
    # 40 bonds away from site 60 the weight of its outlier is below 50 * 0.71^80 < 1e-9 of max|dv|.
    assert (ward_bound(v, w, 1j)[:20] < 0.02 * maximum_bound(w - v, G, H, 1.0)[:20]).all()


def test_bounds_take_batches() -> None:
    v = normal(0, 30).reshape(3, 10)
    w = v + 0.1 * normal(1, 10)
    bound = ward_bound(v, w, 0.4j)
    assert bound.shape == (3, 10)
    torch.testing.assert_close(bound[2], ward_bound(v[2], w[2], 0.4j), rtol=1e-14, atol=1e-14)
    assert uniform_bound(w - v, 0.4).shape == (3, 1)


# ----------------------------------------------------------------------------------------- errors

V = torch.zeros(5, dtype=torch.float64)


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda: disc_range(0.0), InputError),
        (lambda: disc_range(torch.tensor([1.0, -1.0])), InputError),
        (lambda: in_disc(V, 1.0), DTypeError),
        (lambda: in_disc(V + 0j, math.nan), InputError),
        (lambda: contraction_factor(1.0, 0.0), InputError),
        (lambda: uniform_bound(V, -1.0), InputError),
        (lambda: maximum_bound(V, V, V + 0j, 1.0), DTypeError),
        (lambda: maximum_bound(V, V + 0j, V + 0j, 0.0), InputError),
        (lambda: ward_bound(V + 0j, V, 1j), DTypeError),
        (lambda: ward_bound(V, V, 1.0 + 0j), InputError),
    ],
)
def test_errors_name_what_is_wrong(call: Callable[[], object], error: type[Exception]) -> None:
    with pytest.raises(error):
        call()


@pytest.mark.parametrize("name", ["AttentionInputs", *sorted(enclosures.__all__)])
def test_names_that_moved_warn(name):
    place = attention if name == "AttentionInputs" else enclosures
    with pytest.warns(DeprecationWarning, match=f"{name} is {place.__name__}.{name} now"):
        assert getattr(bounds, name) is getattr(place, name)
