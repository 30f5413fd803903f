"""The public functions: shapes, dtypes, gradients, and the properties of a resolvent."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bkcore.core import causal_sweep, causal_sweep_parts, oracle, resolvent_diagonal
from bkcore.errors import DTypeError, InputError, ShapeError
from bkcore.kernels import use_backend


@pytest.fixture(params=["reference", "cpu"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with use_backend(request.param):
        yield request.param


def normal(*shape: int, grad: bool = False) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).requires_grad_(grad)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


# float64, v of order 1 and eta >= 0.2: 1/eta^2 = 25 times a few dozen roundings of 1e-16.
CLOSE: dict[str, Any] = {"rtol": 0.0, "atol": 1e-13}


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("sites", [1, 2, 3, 12])
def test_matches_the_oracle(causal, sites):
    v, z = normal(sites), 0.3 + 0.4j
    options: dict[str, Any] = {"hopping": normal(sites - 1), "onsite": normal(sites)}
    green = oracle.left_connected if causal else oracle.diagonal
    got = resolvent_diagonal(v, z, causal=causal, **options)
    torch.testing.assert_close(got, green(v, z, **options), **CLOSE)
    default = resolvent_diagonal(v, z, causal=causal)
    torch.testing.assert_close(default, green(v, z), **CLOSE)


def test_site_dependent_z_matches_the_oracle():
    v, z = normal(7), torch.complex(normal(7), 0.2 + normal(7).abs())
    torch.testing.assert_close(resolvent_diagonal(v, z), oracle.diagonal(v, z), **CLOSE)


def test_leading_dimensions_broadcast():
    v = normal(2, 1, 6)
    z = torch.complex(normal(3, 1), torch.full((3, 1), 0.5, dtype=torch.float64))
    onsite, hopping = normal(2, 1, 1), normal(4, 1, 1, 5)
    got = resolvent_diagonal(v, z, hopping=hopping, onsite=onsite)
    assert got.shape == (4, 2, 3, 6)
    one = oracle.diagonal(v[1, 0], z[2].item(), hopping=hopping[3, 0, 0], onsite=onsite[1].item())
    torch.testing.assert_close(got[3, 1, 2], one, **CLOSE)


@pytest.mark.parametrize("z", [0.3 + 0.5j, torch.tensor(0.3 + 0.5j), torch.tensor([0.3 + 0.5j])])
def test_z_as_number_and_as_tensor(z):
    v = normal(2, 5)
    # The tensors hold 0.3 in single precision.
    torch.testing.assert_close(
        resolvent_diagonal(v, z), resolvent_diagonal(v, 0.3 + 0.5j), rtol=0, atol=1e-6
    )


@pytest.mark.parametrize(
    ("given", "result"),
    [
        (torch.float64, torch.complex128),
        (torch.float32, torch.complex64),
        (torch.bfloat16, torch.complex64),
        (torch.float16, torch.complex64),
    ],
    ids=str,
)
def test_dtypes(given, result):
    v = normal(3, 8).to(given)
    got = resolvent_diagonal(v, torch.tensor(1j, dtype=torch.complex128))
    assert got.dtype == result
    assert torch.equal(got, resolvent_diagonal(v.to(got.real.dtype), 1j))
    parts = causal_sweep_parts(v.unsqueeze(0), energy=0.0, eta=1.0)
    assert parts.dtype == got.real.dtype


def test_autocast_computes_in_single_precision():
    v, b = torch.randn(2, 4, 3), torch.randn(2, 4, 3)
    want = causal_sweep_parts(v, b, energy=0.0, eta=1.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = causal_sweep_parts(v, b, energy=0.0, eta=1.0)
    assert torch.equal(got, want)


@pytest.mark.parametrize("causal", [False, True])
def test_gradcheck_of_the_diagonal(backend, causal):
    z = torch.complex(normal(3, 1, 1), 0.2 + normal(3, 1, 1).abs()).requires_grad_()
    inputs = (normal(2, 4, grad=True), z, normal(3, grad=True), normal(2, 1, grad=True))

    def call(v: Tensor, z: Tensor, hopping: Tensor, onsite: Tensor) -> Tensor:
        return resolvent_diagonal(v, z, hopping=hopping, onsite=onsite, causal=causal)

    assert torch.autograd.gradcheck(call, inputs)


@pytest.mark.parametrize("causal", [False, True])
def test_gradcheck_of_the_diagonal_per_site(backend, causal):
    z = torch.complex(normal(4), 0.2 + normal(4).abs()).requires_grad_()
    inputs = (normal(4, grad=True), z, normal(2, 1, grad=True), normal(2, 4, grad=True))

    def call(v: Tensor, z: Tensor, hopping: Tensor, onsite: Tensor) -> Tensor:
        return resolvent_diagonal(v, z, hopping=hopping, onsite=onsite, causal=causal)

    assert torch.autograd.gradcheck(call, inputs)


@pytest.mark.parametrize("with_source", [False, True])
@pytest.mark.parametrize("channels", [(), (3,)])
def test_gradcheck_of_the_causal_sweep(backend, with_source, channels):
    eta = (0.2 + normal(*channels).abs()).requires_grad_()
    others = [normal(*channels, grad=True) for _ in range(3)]
    inputs = [normal(2, 4, 3, grad=True), eta, *others]
    inputs += [normal(2, 4, 3, grad=True)] if with_source else []

    def call(v, eta, energy, hopping, onsite, source=None):
        return causal_sweep(v, source, energy=energy, eta=eta, hopping=hopping, onsite=onsite)

    assert torch.autograd.gradcheck(call, inputs)


def test_gradient_is_global():
    """dG_ii/dv_j = -G_ij^2, for every j and not for j = i alone."""
    v, z, i = normal(6, grad=True), 0.1 + 0.3j, 2
    g = resolvent_diagonal(v, z)
    row = oracle.resolvent(v.detach(), z)[i]
    (real,) = torch.autograd.grad(g[i].real, v, retain_graph=True)
    (imag,) = torch.autograd.grad(g[i].imag, v)
    torch.testing.assert_close(torch.complex(real, imag), -row.square(), **CLOSE)


def test_causal_sweep_matches_the_oracle():
    v, b, energy, hopping = normal(2, 6, 3), normal(2, 6, 3), normal(3), normal(3)
    g, psi = causal_sweep(v, b, energy=energy, eta=0.4, hopping=hopping, onsite=-1.5)
    for n in range(2):
        for h in range(3):
            options: dict[str, Any] = {"hopping": hopping[h], "onsite": -1.5}
            z = complex(energy[h].item(), 0.4)
            want = oracle.left_connected(v[n, :, h], z, **options)
            torch.testing.assert_close(g[n, :, h], want, **CLOSE)
            want = oracle.propagated(v[n, :, h], b[n, :, h], z, **options)
            torch.testing.assert_close(psi[n, :, h], want, **CLOSE)


def test_parts_are_the_complex_results_side_by_side():
    v, b = normal(2, 5, 3), normal(2, 5, 3)
    parts = causal_sweep_parts(v, b, energy=0.1, eta=0.5)
    g, psi = causal_sweep(v, b, energy=0.1, eta=0.5)
    assert torch.equal(parts, torch.stack((g.real, g.imag, psi.real, psi.imag), 2))
    assert parts.view(2, 5, 12).data_ptr() == parts.data_ptr()
    alone = causal_sweep(v, energy=0.1, eta=0.5)
    assert isinstance(alone, Tensor)
    assert torch.equal(alone, g)


def test_one_site_after_another_agrees_with_the_functions_of_one_form():
    v = normal(3, 7)
    causal = resolvent_diagonal(v, 0.2 + 0.6j, causal=True)
    sweep = causal_sweep(v.t().unsqueeze(0), energy=0.2, eta=0.6)
    torch.testing.assert_close(causal, sweep[0].t(), rtol=0, atol=1e-15)
    assert torch.equal(causal[:, -1], resolvent_diagonal(v, 0.2 + 0.6j)[:, -1])


potentials = st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=12).map(
    lambda values: torch.tensor(values, dtype=torch.float64)
)


@settings(max_examples=60)
@given(potentials, st.floats(-3, 3), st.floats(0.01, 10), st.floats(0, 3), st.booleans())
def test_values_lie_in_the_disc(v, energy, eta, hopping, causal):
    g = resolvent_diagonal(v, complex(energy, eta), hopping=hopping, causal=causal)
    # Round-off may leave the disc by a few units of its own radius.
    assert ((g - 0.5j / eta).abs() <= 0.5 / eta * (1 + 1e-13)).all()
    assert (g.imag > 0).all()


@settings(max_examples=40)
@given(potentials, st.floats(-3, 3), st.floats(0.05, 10), st.floats(0, 3))
def test_ward_identity(v, energy, eta, hopping):
    """sum_j |G_ij|^2 = Im G_ii / eta."""
    z = complex(energy, eta)
    matrix = oracle.resolvent(v, z, hopping=hopping)
    diagonal = resolvent_diagonal(v, z, hopping=hopping)
    torch.testing.assert_close(
        diagonal.imag / eta, matrix.abs().square().sum(1), rtol=1e-9, atol=1e-14
    )


def test_zero_hopping_cuts_the_chain():
    v = normal(6)
    hopping = torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0])
    whole = resolvent_diagonal(v, 0.5j, hopping=hopping)
    halves = [resolvent_diagonal(part, 0.5j) for part in v.split(3)]
    assert torch.equal(whole, torch.cat(halves))


def test_empty_batch():
    assert resolvent_diagonal(torch.zeros(0, 4), 1j).shape == (0, 4)


def test_nan_goes_through():
    v = torch.zeros(2, 5)
    v[1, 3] = torch.nan
    g = resolvent_diagonal(v, 1j)
    assert g[0].isfinite().all()
    assert g[1].isnan().all()


def test_compiles_without_a_graph_break():
    eta = torch.tensor([0.5, 0.6, 0.7], requires_grad=True)

    def call(v: Tensor, b: Tensor) -> Tensor:
        return causal_sweep_parts(v, b, energy=0.1, eta=eta).square().sum()

    v, b = torch.randn(2, 5, 3, requires_grad=True), torch.randn(2, 5, 3)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(v, b), (v, eta))
    want = torch.autograd.grad(call(v, b), (v, eta))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_exports():
    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.eta = torch.nn.Parameter(torch.ones(3))

        def forward(self, v: Tensor) -> Tensor:
            return causal_sweep_parts(v, energy=0.0, eta=self.eta)

    layer, v = Layer(), torch.randn(2, 6, 3)
    sites = torch.export.Dim("sites", min=2, max=64)
    program = torch.export.export(layer, (v,), dynamic_shapes=({1: sites},))
    longer = torch.randn(2, 9, 3)
    assert torch.equal(program.module()(longer), layer(longer))


@pytest.mark.parametrize(
    ("v", "z", "options", "error", "message"),
    [
        (torch.zeros(4, dtype=torch.complex64), 1j, {}, DTypeError, "v must be real"),
        (torch.zeros(4, dtype=torch.int64), 1j, {}, DTypeError, "floating-point"),
        (torch.zeros(3, 0), 1j, {}, ShapeError, "N >= 1"),
        (torch.tensor(1.0), 1j, {}, ShapeError, "N >= 1"),
        (torch.zeros(4), 1.0, {}, InputError, "Im z must be > 0, not 0"),
        (torch.zeros(4), 1 - 2j, {}, InputError, "not -2.0.*z = 1j"),
        (torch.zeros(4), complex(0, float("nan")), {}, InputError, "not nan"),
        (torch.zeros(4), torch.tensor([1j, 1j, -1j, 1j]), {}, InputError, "not -1.0"),
        (torch.zeros(4), torch.tensor(1.0), {}, InputError, "z must be complex"),
        (torch.zeros(4), torch.full((3,), 1j), {}, ShapeError, "last dimension"),
        (torch.zeros(2, 4), torch.full((3, 4), 1j), {}, ShapeError, "leading dimensions"),
        (torch.zeros(4), 1j, {"hopping": torch.ones(4)}, ShapeError, "hopping must be 3 or 1"),
        (torch.zeros(4), 1j, {"hopping": torch.full((3,), 1j)}, DTypeError, "hopping must be real"),
        (torch.zeros(4), 1j, {"onsite": torch.ones(3)}, ShapeError, "onsite must be 4 or 1"),
    ],
)
def test_bad_input_to_the_diagonal_raises(v, z, options, error, message):
    with pytest.raises(error, match=message):
        resolvent_diagonal(v, z, **options)


def test_energy_and_onsite_that_do_not_broadcast_raise():
    with pytest.raises(ShapeError, match="do not broadcast"):
        resolvent_diagonal(torch.zeros(4), torch.full((4,), 1j), onsite=torch.ones(3))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"v": torch.zeros(5, 3)}, ShapeError, r"v must be \(B, N, H\)"),
        ({"v": torch.zeros(2, 0, 3)}, ShapeError, "N >= 1"),
        ({"v": torch.zeros(2, 5, 3, dtype=torch.int32)}, DTypeError, "floating-point"),
        ({"source": torch.zeros(2, 5, 1)}, ShapeError, "source must have the shape of v"),
        ({"source": torch.zeros(2, 5, 3) * 1j}, DTypeError, "source must be real"),
        ({"eta": 0.0}, InputError, "eta must be > 0, not 0.0"),
        ({"eta": torch.tensor([1.0, -0.5, 1.0])}, InputError, "eta must be > 0, not -0.5"),
        ({"eta": torch.ones(2)}, ShapeError, r"eta must be a number or \(3,\)"),
        ({"energy": torch.zeros(3) * 1j}, DTypeError, "energy must be real"),
        ({"hopping": torch.ones(5, 3)}, ShapeError, "hopping must be a number"),
    ],
)
def test_bad_input_to_the_causal_sweep_raises(changes, error, message):
    arguments = {"v": torch.zeros(2, 5, 3), "energy": 0.0, "eta": 1.0, **changes}
    with pytest.raises(error, match=message):
        causal_sweep_parts(**arguments)


def test_mixed_precision_of_v_and_source_takes_the_wider():
    v, b = torch.randn(1, 4, 2), normal(1, 4, 2)
    parts = causal_sweep_parts(v, b, energy=0.0, eta=1.0)
    assert torch.equal(parts, causal_sweep_parts(v.double(), b, energy=0.0, eta=1.0))
