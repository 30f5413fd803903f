"""The one rounding function: codes, their values, and the gradients that pass through them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bkcore.quantization import affine


@pytest.mark.parametrize(("bits", "expected"), [(8, (-128, 127)), (4, (-8, 7))])
def test_code_range(bits, expected):
    assert affine.code_range(bits) == expected


def test_ties_round_to_even():
    x = torch.tensor([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 3.5])
    codes = affine.quantize(x, torch.tensor(1.0), 0, 8)
    assert codes.tolist() == [-2, -2, 0, 0, 2, 2, 4]


def test_the_zero_point_is_added_after_rounding():
    # Rounding 0.5 + 1 instead would give 2.
    assert affine.quantize(torch.tensor(0.5), torch.tensor(1.0), 1, 8).item() == 1


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("zero_point", [0, -3])
def test_values_out_of_range_saturate(bits, zero_point):
    qmin, qmax = affine.code_range(bits)
    scale = torch.tensor(0.5)
    x = torch.tensor([-1e30, 1e30, -torch.inf, torch.inf])
    assert affine.quantize(x, scale, zero_point, bits).tolist() == [qmin, qmax, qmin, qmax]
    restored = affine.fake_quantize(x, scale, zero_point, bits)
    ends = [0.5 * (qmin - zero_point), 0.5 * (qmax - zero_point)]
    assert restored.tolist() == ends * 2


def test_nan_stays_nan():
    x = torch.tensor([1.0, torch.nan])
    restored = affine.fake_quantize(x, torch.tensor(0.5), 3, 4)
    assert restored.isnan().tolist() == [False, True]


@given(
    x=st.floats(-1e6, 1e6, width=32),
    exponent=st.integers(-20, 20),
    bits=st.sampled_from([4, 8]),
    offset=st.floats(0, 1),
)
def test_error_inside_the_range_is_at_most_half_a_step(x, exponent, bits, offset):
    qmin, qmax = affine.code_range(bits)
    zero_point = round(qmin + offset * (qmax - qmin))
    scale = affine.storable(torch.tensor(1.37 * 2.0**exponent))
    low, high = scale * (qmin - zero_point), scale * (qmax - zero_point)
    value = torch.tensor(x).clamp(low, high)
    error = (affine.fake_quantize(value, scale, zero_point, bits) - value).abs()
    # Codes are below 2^8 and a float32 quotient is off by 2^-24 of itself: 2^-16 of a step.
    assert error <= scale * (0.5 + 2.0**-16)


@given(st.integers(-128, 127), st.integers(-128, 127), st.integers(-20, 20))
def test_codes_survive_their_own_values(code, zero_point, exponent):
    scale = affine.storable(torch.tensor(1.61 * 2.0**exponent))
    value = affine.dequantize(torch.tensor(float(code)), scale, zero_point)
    assert affine.quantize(value, scale, zero_point, 8).item() == code


@pytest.mark.parametrize("bits", [4, 8])
def test_gradient_is_straight_through_inside_and_zero_outside(bits):
    qmin, qmax = affine.code_range(bits)
    x = torch.tensor([qmin - 0.6, qmin + 0.3, 0.0, qmax - 0.3, qmax + 0.6], requires_grad=True)
    affine.fake_quantize(x, torch.tensor(1.0), 0, bits).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [0, 1, 1, 1, 0]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("zero_point", [0, 2])
def test_gradient_of_the_scale_is_that_of_learned_step_sizes(bits, zero_point):
    """Esser et al. 2020, eq. 3: round(x/s) - x/s inside the range, the end code outside."""
    qmin, qmax = affine.code_range(bits)
    scale = torch.tensor(0.25, requires_grad=True)
    x = torch.linspace(-2.3 * qmax * 0.25, 2.3 * qmax * 0.25, 41)
    ratio = x / 0.25
    low, high = qmin - zero_point, qmax - zero_point
    expected = torch.where(
        ratio.round() < low, low, torch.where(ratio.round() > high, high, ratio.round() - ratio)
    )
    for value, wanted in zip(x, expected, strict=True):
        (grad,) = torch.autograd.grad(affine.fake_quantize(value, scale, zero_point, bits), scale)
        # Two float32 operations on numbers below 2^8: 2^-15.
        assert abs(grad - wanted) < 2.0**-15


def test_a_tiny_scale_does_not_make_nan_of_the_gradients():
    """x / scale overflows; both gradients are those of any value that saturates."""
    x = torch.tensor([1e3, -1e3, torch.inf], requires_grad=True)
    scale = torch.tensor(1e-37, requires_grad=True)
    affine.fake_quantize(x, scale, 0, 8).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [0, 0, 0]
    assert scale.grad == 127 - 128 + 127


def test_quantize_broadcasts_scales_and_zero_points():
    x = torch.tensor([[1.0, 1.0], [2.0, 2.0]])
    codes = affine.quantize(x, torch.tensor([1.0, 0.5]), torch.tensor([0, -1]), 8)
    assert codes.tolist() == [[1, 1], [2, 3]]


@given(st.floats(1e-37, 1e37))
def test_storable_scales_survive_storage(value):
    scale = affine.storable(torch.tensor(value))
    assert torch.equal(scale.to(affine.SCALE_DTYPE).float(), scale)
    # bfloat16 keeps 8 bits of the mantissa; rounding moves a value by at most 2^-9 of the result.
    assert abs(scale.item() / value - 1) <= 2.0**-8


def test_storing_a_scale_passes_its_gradient():
    scale = torch.tensor(0.3, requires_grad=True)
    affine.storable(scale).backward()
    assert scale.grad == 1


@pytest.mark.parametrize("value", [0.0, 1e-44, 1e-41])
def test_no_storable_scale_is_zero(value):
    assert affine.storable(torch.tensor(value)) > 0


@settings(max_examples=50)
@given(st.floats(-1e30, 1e30))
def test_learned_scales_are_positive_and_finite(log_scale):
    log_scale = torch.tensor(log_scale, requires_grad=True)
    scale = affine.scale_from_log(log_scale)
    assert scale > 0
    assert torch.isfinite(scale)
    (grad,) = torch.autograd.grad(scale, log_scale)
    assert torch.isfinite(grad)
    restored = affine.fake_quantize(torch.tensor([0.0, 1.0, -1.0]), scale.detach(), 0, 8)
    assert torch.isfinite(restored).all()


@given(st.integers(-120, 112))
def test_a_stored_scale_survives_its_logarithm(exponent):
    scale = affine.storable(torch.tensor(1.7 * 2.0**exponent))
    assert torch.equal(affine.scale_from_log(scale.log()), scale)
