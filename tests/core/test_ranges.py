"""Over many decades of every argument: a result with the backward error of theory, or a refusal."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from bkcore import (
    BirmanSchwingerCore,
    QuantizedBirmanSchwingerCore,
    causal_sweep,
    resolvent_attention,
    resolvent_diagonal,
)
from bkcore.core import BirmanSchwingerOperator, resolvent_apply, spectral_shift
from bkcore.core.bounds import contraction_factor, disc_range, uniform_bound
from bkcore.errors import InputError
from bkcore.kernels import use_backend

DTYPES = {torch.float32: 45, torch.float64: 320, torch.bfloat16: 45}
"""Decades to walk up and down from 1."""

ROUNDINGS = 32
"""Backward errors are allowed so many units of round-off."""


@st.composite
def problems(draw, dtypes=tuple(DTYPES)):
    """dtype, v (N,), E, eta, t, onsite: 0, or of any decade, or of a few neighbouring ones."""
    dtype = draw(st.sampled_from(dtypes))
    decades = DTYPES[dtype]
    centre = draw(st.integers(-decades, decades))
    spread = draw(st.sampled_from([2, 10, 20, 2 * decades]))

    def number(zero: bool = True) -> float:
        if zero and draw(st.integers(0, 4)) == 0:
            return 0.0
        power = max(-decades, min(decades, centre + draw(st.integers(-spread, spread))))
        return draw(st.sampled_from([-1.0, 1.0])) * draw(st.floats(1, 9)) * 10.0 ** min(power, 307)

    v = torch.tensor([number() for _ in range(draw(st.integers(1, 5)))], dtype=torch.float64)
    assume(bool(v.to(dtype).isfinite().all()))
    return dtype, v.to(dtype), number(), abs(number(zero=False)), number(), number()


def assert_names(error: InputError, *names: str) -> None:
    assert any(name in str(error) for name in names)


def exact(x: Tensor) -> list[tuple[Fraction, Fraction]]:
    return [(Fraction(c.real), Fraction(c.imag)) for c in x.tolist()]


def times(a, b):
    return a[0] * b[0] - a[1] * b[1], a[0] * b[1] + a[1] * b[0]


def size(a) -> Fraction:
    return abs(a[0]) + abs(a[1])


def assert_backward_stable(v, energy, eta, t, onsite, left, whole=None, right=None) -> None:
    """`|1 - G (a - z - t^2 g - t^2 r)| <= c u |G| (|v| + |onsite| + |z| + t^2 (|g| + |r|))`."""
    unit = Fraction(2) ** (-53 if left.dtype == torch.complex128 else -24)
    found = exact(left if whole is None else whole)
    zero = (Fraction(0), Fraction(0))
    before = [zero, *exact(left)[:-1]]
    after = [zero] * len(found) if whole is None else [*exact(right)[1:], zero]
    square = Fraction(t) ** 2
    for G, g, r, potential in zip(found, before, after, v.tolist(), strict=True):
        neighbours = (square * (g[0] + r[0]), square * (g[1] + r[1]))
        below = (Fraction(potential) + Fraction(onsite) - Fraction(energy), -Fraction(eta))
        product = times(G, (below[0] - neighbours[0], below[1] - neighbours[1]))
        terms = sum(map(abs, map(Fraction, (potential, onsite, energy, eta))))
        allowed = ROUNDINGS * unit * size(G) * (terms + square * (size(g) + size(r)))
        assert size((product[0] - 1, product[1])) <= allowed


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@settings(max_examples=300)
@given(problem=problems(), as_tensors=st.booleans())
def test_the_diagonal(backend, problem, as_tensors):
    _dtype, v, energy, eta, t, onsite = problem
    z: Any = complex(energy, eta)
    options: dict[str, Any] = {"hopping": t, "onsite": onsite}
    if as_tensors:
        z = torch.tensor([z], dtype=torch.complex128)
        options = {name: torch.tensor([x], dtype=torch.float64) for name, x in options.items()}
    with use_backend(backend):
        try:
            left, whole = (resolvent_diagonal(v, z, causal=c, **options) for c in (True, False))
            right = resolvent_diagonal(v.flip(-1), z, causal=True, **options).flip(-1)
        except InputError as error:
            assert_names(error, "v ", "Im z", "Re z", "onsite", "hopping")
            return
    assert_backward_stable(v, energy, eta, t, onsite, left)
    assert_backward_stable(v, energy, eta, t, onsite, left, whole, right)


@settings(max_examples=200)
@given(problem=problems())
def test_what_is_in_the_documented_range_is_not_refused(problem):
    dtype, v, energy, eta, t, onsite = problem
    largest = 1e150 if dtype == torch.float64 else 1e18
    assume(1 / largest <= eta <= largest)
    assume(max(abs(x) for x in (energy, onsite, *v.tolist())) <= largest)
    assume(abs(t) <= (largest * eta) ** 0.5)
    G = resolvent_diagonal(v, complex(energy, eta), hopping=t, onsite=onsite)
    assert bool(torch.view_as_real(G).isfinite().all())


@settings(max_examples=150)
@given(problem=problems())
def test_the_causal_sweep(problem):
    _dtype, v, energy, eta, t, onsite = problem
    chain = v[None, :, None]
    try:
        g, psi = causal_sweep(
            chain, torch.ones_like(chain), energy=energy, eta=eta, hopping=t, onsite=onsite
        )
    except InputError as error:
        assert_names(error, "v ", "eta", "energy", "onsite", "hopping")
        return
    g, psi = g[0, :, 0], psi[0, :, 0]
    assert_backward_stable(v, energy, eta, t, onsite, g)
    before = torch.cat((psi.new_zeros(1), psi[:-1]))
    wanted = g.to(torch.complex128) * (1 + t * before.to(torch.complex128))
    scale = (g.abs().double() * (1 + abs(t) * before.abs().double())).nan_to_num(torch.inf)
    info = torch.finfo(g.real.dtype)
    if bool((scale < info.max).all()):  # else psi itself leaves the floating-point numbers
        distance = (psi - wanted).abs()
        assert bool((distance <= ROUNDINGS * info.eps * scale + 8 * info.tiny).all())


@settings(max_examples=150)
@given(problem=problems())
def test_attention(problem):
    dtype, v, _, eta, t, _ = problem
    wide = torch.ones(1, len(v), 1, 1, dtype=dtype)
    try:
        hopping = torch.full((1, len(v), 1), t, dtype=torch.float64).to(dtype)
        _, g, _ = resolvent_attention(wide, wide, wide, hopping, v[None, :, None], eta)
    except InputError as error:
        assert_names(error, "potential", "eta", "hopping")
        return
    bonds = hopping[0, :, 0].double()
    unit, last = torch.finfo(g.real.dtype).eps, 0.0
    for i, G in enumerate(g[0, :, 0].tolist()):
        square = float(bonds[i]) ** 2 if i else 0.0
        terms = (1.0, square, float(v[i]), -1j * eta, -square * last)
        assert abs(G * sum(terms) - 1) <= ROUNDINGS * unit * abs(G) * sum(map(abs, terms))
        last = G


@settings(max_examples=100)
@given(problem=problems())
def test_the_modules_take_what_the_function_takes(problem):
    _dtype, v, energy, eta, t, onsite = problem
    options = {"energy": energy, "hopping": t, "onsite": onsite}

    def attempt(call):
        try:
            return call()
        except InputError:
            return None

    G = attempt(lambda: resolvent_diagonal(v, complex(energy, eta), hopping=t, onsite=onsite))
    for kind in (
        lambda: BirmanSchwingerCore(len(v), eta, **options),
        lambda: QuantizedBirmanSchwingerCore(len(v), "ptq_int8", eta, **options),
    ):
        features = attempt(lambda build=kind: build()(v))
        assert (G is None) == (features is None)
        assert G is None or torch.equal(torch.view_as_complex(features), G)


@settings(max_examples=100)
@given(problem=problems((torch.float32, torch.float64)))
def test_the_operator(problem):
    dtype, v, energy, eta, t, onsite = problem
    z = complex(energy, eta)
    try:
        K = BirmanSchwingerOperator(v, z, hopping=t, onsite=onsite)
        applied = resolvent_apply(v, z, torch.ones_like(v), hopping=t, onsite=onsite)
    except InputError:
        return
    left, free = (
        resolvent_diagonal(x, z, hopping=t, onsite=onsite, causal=True).to(torch.complex128)
        for x in (v, 0 * v)
    )
    log_det = free.log().sum() - left.log().sum()
    unit = torch.finfo(dtype).eps
    scale = float(free.log().abs().sum() + left.log().abs().sum()) + len(v)
    assert abs(complex(K.log_det()) - complex(log_det)) <= ROUNDINGS * unit * scale
    norm, bound = K.hilbert_schmidt_norm_squared(), K.hilbert_schmidt_bound()
    # A bound of round-off's accuracy, which |H - E| / eta magnifies.
    relative = 64 * len(v) * unit * (1 + (abs(onsite) + abs(energy) + 2 * abs(t)) / eta)
    if relative < 0.1 and bool(norm.isfinite()):
        assert norm <= bound * (1 + relative)
    assert bool(applied.isfinite().all())


@settings(max_examples=200)
@given(problem=problems((torch.float64,)), power=st.integers(-900, 900))
def test_a_spectral_shift_does_not_depend_on_the_unit_of_energy(problem, power):
    _, v, energy, _, t, onsite = problem
    numbers = torch.tensor([*v.tolist(), energy, t, onsite], dtype=torch.float64)
    sizes = numbers[numbers != 0].abs()
    assume(len(sizes) and float(sizes.max() / sizes.min()) < 1e15)
    numbers = numbers / sizes.max()

    def counted(x: Tensor) -> int:
        energy, hopping, onsite = x[-3:].tolist()
        return int(spectral_shift(x[:-3], energy, hopping=hopping, onsite=onsite))

    try:
        got = counted(numbers * 2.0**power)
    except InputError as error:
        assert_names(error, "v must", "energy must", "hopping must", "onsite must")
        return
    assert got == counted(numbers)


@pytest.mark.parametrize("value", [1e-320, 1e-200, 1e-20, 1.0, 1e20, 1e200, 1e308])
@pytest.mark.parametrize("other", [1e-200, 1.0, 1e200])
def test_simple_bounds_of_any_number(value, other):
    factor = contraction_factor(other, value)
    assert 0 <= factor <= 1
    tensor = contraction_factor(torch.tensor(other, dtype=torch.float64), value)
    assert float(tensor) == pytest.approx(factor, rel=1e-12)
    assert contraction_factor(0.0, value) == 0
    for eta in (value, torch.tensor(value, dtype=torch.float64)):
        (low, high), (zero, top) = disc_range(eta)
        assert -low == high
        assert zero == 0
        assert top > 0
        bound = uniform_bound(torch.tensor([0.0, 1.0], dtype=torch.float64), eta)
        assert (
            float(bound) >= float(Fraction(1) / Fraction(value) ** 2) * 0.999
            if (value > 1e-150)
            else bound.isinf().all()
        )


def test_nan_goes_through_and_does_not_hide_the_rest():
    v = torch.tensor([[torch.nan, 0.0], [0.0, 0.0]])
    G = resolvent_diagonal(v, 1j)
    assert bool(G[0].isnan().all() and G[1].isfinite().all())
    v[1, 1] = 1e30
    with pytest.raises(InputError, match="v reaches 1e\\+30"):
        resolvent_diagonal(v, 1j)
    assert bool(resolvent_diagonal(torch.zeros(3), 1j, hopping=torch.nan)[1].isnan())


def test_chains_have_ranges_of_their_own():
    """Fifteen decades of chains, each of them harmless, in one call."""
    unit = 10.0 ** torch.arange(-15, 16, dtype=torch.float64)[:, None]
    v = torch.tensor([[0.3, -1.0, 0.7]]).double() * unit
    z = torch.complex(0 * unit, unit)
    G = resolvent_diagonal(v.float(), z, hopping=unit, onsite=-2 * unit)
    one = resolvent_diagonal(v[15].float(), 1j)
    torch.testing.assert_close(G * unit.float(), one.expand_as(G), rtol=1e-5, atol=0)
    eta = unit.flatten()
    g = causal_sweep(v.float().t()[None], energy=0.0, eta=eta, hopping=eta, onsite=-2 * eta)
    middle: Any = causal_sweep(v[15].float()[None, :, None], energy=0.0, eta=1.0)
    torch.testing.assert_close(g * eta.float(), middle.expand_as(g), rtol=1e-5, atol=0)


def test_values_are_not_looked_at_where_that_is_impossible():
    big = torch.full((2, 3), 1e30)
    assert resolvent_diagonal(big.to("meta"), 1j).shape == (2, 3)
    torch.func.vmap(lambda v: resolvent_diagonal(v, 1j))(big)
    torch.func.vmap(lambda v, t: resolvent_diagonal(v, 1j, hopping=t))(0 * big, big[:, :2])
    eta = torch.ones(2, 3)
    torch.func.vmap(lambda v, e: causal_sweep(v, energy=0.0, eta=e))(torch.ones(2, 1, 4, 3), eta)
