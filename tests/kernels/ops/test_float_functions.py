"""Float functions in an order: near the truth, and with the same bits everywhere."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from bkcore import kernels
from bkcore.errors import InputError
from bkcore.kernels import in_order, use_backend
from bkcore.kernels.backends.cpu import native
from tests.kernels.operators import arguments, call

ULP = 2.0**-24
"""Half a unit in the last place of a number near 1: the error of one rounding in float32."""

NAMES = ("silu", "rms_norm", "unit_length", "short_convolution", "dense_product", "softmax")
SCALES = st.sampled_from([1e-30, 1e-3, 1.0, 30.0, 1e30])


def on_every_backend(name: str, args: dict[str, object]) -> list[Tensor]:
    with use_backend("reference"):
        results = [call(name, args)[0]]
    for isa in native.supported_isas():
        with native.use_isa(isa):
            results.append(call(name, args)[0])
    return results


def assert_same_bits(results: list[Tensor]) -> None:
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=0, atol=0, equal_nan=True)


@given(
    rows=st.integers(0, 5),
    channels=st.integers(1, 70),
    scale=SCALES,
    name=st.sampled_from(["silu", "rms_norm", "unit_length", "softmax"]),
    seed=st.integers(0, 999),
)
@settings(max_examples=80, deadline=None)
def test_rows_have_the_same_bits_everywhere(rows, channels, scale, name, seed):
    args = arguments(name, rows=rows, channels=channels)
    random = torch.Generator().manual_seed(seed)
    args["x"] = scale * torch.randn(rows, channels, generator=random)
    assert_same_bits(on_every_backend(name, args))


@given(
    rows=st.integers(0, 9),
    inputs=st.integers(0, 70),
    outputs=st.integers(0, 9),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    scale=SCALES,
)
@settings(max_examples=60, deadline=None)
def test_products_have_the_same_bits_everywhere(rows, inputs, outputs, dtype, scale):
    args = arguments("dense_product", rows=rows, inputs=inputs, outputs=outputs)
    args["x"] *= scale
    args["weight"] = args["weight"].to(dtype)
    assert_same_bits(on_every_backend("dense_product", args))


@given(
    batch=st.integers(0, 3),
    sites=st.integers(1, 9),
    taps=st.integers(1, 5),
    channels=st.integers(1, 40),
    scale=SCALES,
)
@settings(max_examples=60, deadline=None)
def test_convolutions_have_the_same_bits_everywhere(batch, sites, taps, channels, scale):
    sizes = {"batch": batch, "sites": sites, "taps": taps, "channels": channels}
    args = arguments("short_convolution", **sizes)
    args["x"] *= scale
    assert_same_bits(on_every_backend("short_convolution", args))


@pytest.mark.parametrize("name", NAMES)
def test_values_that_are_not_finite(name):
    """NaN and infinity stay in their rows, and get there on every backend."""
    args = arguments(name, **({"channels": 37} if name != "dense_product" else {"inputs": 37}))
    expected = call(name, args)[0]
    for value in (math.nan, math.inf, -math.inf):
        args["x"][0, 0] = value
        results = on_every_backend(name, args)
        assert_same_bits(results)
        assert torch.equal(results[0][-1], expected[-1])
        if math.isnan(value):
            assert results[0][0].isnan().any()


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_every_half_is_read_as_it_is(half):
    """All 2^16 of them, subnormal numbers and infinities among them."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(half)[:, None]
    found = kernels.dense_product(torch.ones(1, 1), every)[0]
    assert_same_bits([found, every.float()[:, 0] * 1])


def test_exponentials_are_within_two_units_in_the_last_place():
    """Through softmax of (x, 0), whose first power is exp(x) and whose second is 1."""
    x = torch.cat((-torch.rand(200_000) * 87, -torch.logspace(-6, 0, 1000)))
    shares = kernels.softmax(torch.stack((x, torch.zeros(len(x))), 1)).double()
    expected = np.exp(x.double().numpy())
    expected = torch.from_numpy(expected / (1 + expected))
    # A sum, two quotients, and twice the error of the exponential.
    assert ((shares[:, 0] - expected).abs() <= 7 * ULP * expected).all()


def test_silu():
    x = torch.linspace(-80, 80, 100_001)
    expected = x.double() * torch.sigmoid(x.double())
    # The exponential, a sum and a quotient.
    assert ((kernels.silu(x) - expected).abs() <= 6 * ULP * expected.abs()).all()
    limits = kernels.silu(torch.tensor([-1e30, -100.0, 100.0, 1e30, math.inf]))
    assert (limits[:2].abs() <= torch.tensor([1e-8, 1e-36])).all()
    assert torch.equal(limits[2:], torch.tensor([100.0, 1e30, math.inf]))


@pytest.mark.parametrize("channels", [1, 15, 16, 17, 256, 1000])
def test_against_the_truth(channels):
    """In float64; a sum of K terms in sixteen parts is off by at most (K / 16 + 5) roundings."""
    torch.manual_seed(0)
    x, weight = torch.randn(7, channels), torch.randn(channels)
    error = (channels // 16 + 12) * ULP
    double = x.double()
    norm = F.rms_norm(double, (channels,), weight.double(), 1e-6)
    assert ((kernels.rms_norm(x, weight, 1e-6) - norm).abs() <= error * norm.abs()).all()
    unit = double / (double.square().sum(-1, keepdim=True) + 1e-6).sqrt()
    assert ((kernels.unit_length(x, 1e-6) - unit).abs() <= error * unit.abs()).all()
    weights = torch.randn(5, channels)
    exact = double @ weights.double().t()
    sizes = double.abs() @ weights.double().abs().t()
    assert ((kernels.dense_product(x, weights) - exact).abs() <= error * sizes).all()
    shares = double.softmax(-1)
    off = (kernels.softmax(x) - shares).abs()
    # The differences before the exponential are off by a rounding of at most 2 |x|.
    assert (off <= (channels + 12 + 2 * double.abs().max()) * ULP * shares).all()


def test_convolution_against_pytorch():
    torch.manual_seed(0)
    x, weight = torch.randn(2, 12, 21), torch.randn(4, 21)
    exact = F.conv1d(x.double().transpose(1, 2), weight.double().t()[:, None], groups=21)
    exact = F.silu(exact.transpose(1, 2))
    sizes = F.conv1d(x.abs().transpose(1, 2), weight.abs().t()[:, None], groups=21)
    # Eight roundings of the sum, whose slope through SiLU is at most 1.1, and six of SiLU.
    bound = 16 * ULP * (sizes.transpose(1, 2) + exact.abs())
    assert ((kernels.short_convolution(x, weight) - exact).abs() <= bound).all()


@pytest.mark.parametrize("name", NAMES)
def test_threads_and_rows_change_no_bit(name):
    sizes = {"dense_product": {"rows": 700, "inputs": 33, "outputs": 130}}
    sizes["short_convolution"] = {"batch": 3, "sites": 300, "channels": 37}
    args = arguments(name, **sizes.get(name, {"rows": 700, "channels": 37}))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = call(name, args)[0]
        torch.set_num_threads(2)
        assert torch.equal(call(name, args)[0], expected)
    finally:
        torch.set_num_threads(before)
    rows = 1 if name == "short_convolution" else 3
    part = call(name, {**args, "x": args["x"][:rows]})[0]
    assert torch.equal(part, expected[:rows])


def test_where_they_stand_in_for_pytorchs():
    x = torch.randn(3)
    assert not in_order(x)
    with torch.no_grad():
        assert in_order(x)
        assert not in_order(x.double())
        assert not in_order(x.half())


@pytest.mark.parametrize("eps", [-1.0, -1e-30, math.nan, math.inf, 1e39])
@pytest.mark.parametrize("name", ["rms_norm", "unit_length"])
def test_eps_has_a_range(name, eps):
    args = arguments(name, rows=2, channels=3)
    with pytest.raises(InputError, match="eps must be at least 0 and finite in float32, not"):
        call(name, {**args, "eps": eps})
    assert call(name, {**args, "eps": 0.0})[0].isfinite().all()
