"""GroupWiseQuantizer, and what ComplexQuantizer has in common with it."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bkcore.errors import CalibrationError, DTypeError, InputError, LifecycleError, ShapeError
from bkcore.quantization import ComplexQuantizer, GroupWiseQuantizer, affine


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def calibrated(num_channels: int = 6, group_size: int = 4, bits: int = 8, **options):
    quantizer = GroupWiseQuantizer(num_channels, group_size, bits, **options)
    quantizer.calibrate(torch.randn(200, num_channels) + 0.5)
    return quantizer


shapes = {
    "num_channels": st.integers(1, 20),
    "group_size": st.integers(1, 24),
    "bits": st.sampled_from([4, 8]),
    "symmetric": st.booleans(),
    "learnable": st.booleans(),
    "seed": st.integers(0, 2**16),
}


@settings(max_examples=60)
@given(**shapes)
def test_any_grouping(num_channels, group_size, bits, symmetric, learnable, seed):
    generator = torch.Generator().manual_seed(seed)
    spread = 10 ** torch.empty(num_channels).uniform_(-3, 3, generator=generator)
    x = spread * (torch.randn(40, num_channels, generator=generator) + 0.3)
    options = {"symmetric": symmetric, "learnable": learnable}
    quantizer = GroupWiseQuantizer(num_channels, group_size, bits, **options)
    quantizer.calibrate(x)

    assert quantizer.num_groups == math.ceil(num_channels / group_size)
    assert quantizer.scales.shape == quantizer.zero_points.shape == (quantizer.num_groups,)
    assert quantizer.scales.dtype == torch.float32
    assert (quantizer.scales > 0).all()
    assert quantizer.zero_points.dtype == torch.int8
    assert not (symmetric and quantizer.zero_points.any())

    codes = quantizer.quantize(x)
    assert codes.dtype == torch.int8
    assert codes.shape == x.shape
    assert (quantizer.qmin, quantizer.qmax) == affine.code_range(bits)
    assert codes.min() >= quantizer.qmin
    assert codes.max() <= quantizer.qmax
    restored = quantizer.dequantize(codes)
    assert restored.dtype == torch.float32
    assert torch.equal(restored, quantizer.fake_quantize(x))

    inside = (codes > quantizer.qmin) & (codes < quantizer.qmax)
    scale = quantizer.scales.repeat_interleave(group_size)[:num_channels].expand_as(x)
    # Codes below 2^8, float32: 2^-16 of a step.
    assert ((restored - x).abs() <= scale * (0.5 + 2.0**-16))[inside].all()

    for group, channels in enumerate(torch.arange(num_channels).split(group_size)):
        alone = GroupWiseQuantizer(len(channels), len(channels), bits, **options)
        alone.calibrate(x[:, channels])
        assert torch.equal(alone.scales, quantizer.scales[group : group + 1])
        assert torch.equal(alone.zero_points, quantizer.zero_points[group : group + 1])
        assert torch.equal(alone.quantize(x[:, channels]), codes[:, channels])


@pytest.mark.parametrize(
    ("group_size", "groups"), [(1, 10), (3, 4), (5, 2), (9, 2), (10, 1), (128, 1)]
)
def test_number_of_groups(group_size, groups):
    assert GroupWiseQuantizer(10, group_size).num_groups == groups


@pytest.mark.parametrize("lead", [(), (5,), (2, 3), (0,), (2, 0)])
def test_any_leading_shape(lead):
    quantizer = calibrated()
    x = torch.randn(*lead, 6)
    codes = quantizer.quantize(x)
    assert codes.shape == x.shape
    assert torch.equal(quantizer.dequantize(codes), quantizer.fake_quantize(x))


def test_asymmetric_codes_do_not_wrap():
    """Code 127 minus zero point -128 is 255, which int8 cannot hold."""
    quantizer = GroupWiseQuantizer(1, 1, 8, symmetric=False)
    quantizer.calibrate(torch.linspace(0, 1, 1000)[:, None])
    assert quantizer.zero_points.item() == -128
    assert quantizer.dequantize(torch.tensor([127], dtype=torch.int8)).item() > 0.9


def test_asymmetric_uses_every_code_of_positive_data():
    x = torch.rand(4000, 1)
    errors = {}
    for symmetric in (True, False):
        quantizer = GroupWiseQuantizer(1, 1, 8, symmetric=symmetric)
        quantizer.calibrate(x)
        errors[symmetric] = (quantizer.fake_quantize(x) - x).abs().mean()
    # One bit more is half the error.
    assert errors[False] < 0.55 * errors[True]


def test_observing_in_batches_equals_one_batch():
    x = torch.randn(60, 6)
    whole, parts = (GroupWiseQuantizer(6, 4, 8, symmetric=False) for _ in range(2))
    whole.calibrate(x)
    for batch in x.split(7):
        parts.observe(batch)
    parts.end_calibration()
    assert torch.equal(whole.scales, parts.scales)
    assert torch.equal(whole.zero_points, parts.zero_points)


def test_calibrating_again_forgets_the_past():
    quantizer, fresh = calibrated(), GroupWiseQuantizer(6, 4, 8)
    x = 100 * torch.randn(50, 6)
    quantizer.observe(torch.full((1, 6), 1e6))
    quantizer.calibrate(x)
    fresh.calibrate(x)
    assert torch.equal(quantizer.scales, fresh.scales)


def test_the_norm_is_the_error_that_is_minimized():
    x = torch.distributions.Laplace(0.0, 1.0).sample((50_000, 1))
    errors = {}
    for norm in (1, 2):
        quantizer = GroupWiseQuantizer(1, 1, 4, norm=norm)
        quantizer.calibrate(x)
        error = (quantizer.fake_quantize(x) - x).abs()
        errors[norm] = (error.mean(), error.square().mean())
    assert errors[1][0] < errors[2][0]
    assert errors[2][1] < errors[1][1]


# ---- what is refused -----------------------------------------------------------------------


@pytest.mark.parametrize("method", ["observe", "calibrate", "quantize", "fake_quantize"])
def test_a_real_quantizer_refuses_complex_values_and_integers(method):
    quantizer = calibrated()
    with pytest.raises(DTypeError, match=r"torch.complex64 values.*use ComplexQuantizer"):
        getattr(quantizer, method)(torch.zeros(2, 6, dtype=torch.complex64))
    for dtype in (torch.int64, torch.bool):
        with pytest.raises(DTypeError, match=f"floating-point values, not {dtype}"):
            getattr(quantizer, method)(torch.zeros(2, 6, dtype=dtype))


@pytest.mark.parametrize("shape", [(), (5,), (6, 5), (2, 7)])
def test_a_wrong_last_axis(shape):
    quantizer = calibrated()
    for method in ("observe", "quantize", "fake_quantize"):
        with pytest.raises(ShapeError, match=r"must be \(\.\.\., 6\)"):
            getattr(quantizer, method)(torch.zeros(shape))
    with pytest.raises(ShapeError, match=r"must be \(\.\.\., 6\)"):
        quantizer.dequantize(torch.zeros(shape, dtype=torch.int8))


def test_dequantize_takes_int8_codes():
    with pytest.raises(DTypeError, match=r"int8 codes, not torch\.float32"):
        calibrated().dequantize(torch.zeros(2, 6))


@pytest.mark.parametrize("learnable", [True, False])
def test_before_calibration(learnable):
    quantizer = GroupWiseQuantizer(6, learnable=learnable)
    assert not quantizer.calibrated
    for method in ("quantize", "fake_quantize"):
        with pytest.raises(LifecycleError, match=r"calibrate\(\)"):
            getattr(quantizer, method)(torch.zeros(6))
    with pytest.raises(LifecycleError, match=r"calibrate\(\)"):
        quantizer.dequantize(torch.zeros(6, dtype=torch.int8))
    quantizer.calibrate(torch.randn(5, 6))
    assert quantizer.calibrated


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_values_that_are_not_finite(bad):
    quantizer = calibrated()
    x = torch.zeros(6)
    x[2] = bad
    with pytest.raises(InputError, match="NaN or infinity"):
        quantizer.quantize(x)
    with pytest.raises(CalibrationError, match="1 of 6 calibration values"):
        quantizer.calibrate(x)
    restored = quantizer.fake_quantize(x)
    assert restored[2].isnan() if math.isnan(bad) else torch.isfinite(restored[2])


def test_calibration_without_data():
    for quantizer in (GroupWiseQuantizer(6), ComplexQuantizer(6)):
        with pytest.raises(CalibrationError, match="saw no data"):
            quantizer.end_calibration()
    with pytest.raises(CalibrationError, match="saw no data"):
        GroupWiseQuantizer(6).calibrate(torch.zeros(0, 6))
    with pytest.raises(CalibrationError, match="saw no data"):
        ComplexQuantizer(6).calibrate(torch.zeros(0, 6, dtype=torch.complex64))


@pytest.mark.parametrize("group_size", [0, -1, True, 2.0])
def test_impossible_group_size(group_size):
    with pytest.raises(InputError, match="group_size must be an integer >= 1"):
        GroupWiseQuantizer(6, group_size)
    with pytest.raises(InputError, match="group_size must be an integer >= 1"):
        ComplexQuantizer(6, group_size=group_size)


@pytest.mark.parametrize("bits", [0, 3, 16])
def test_impossible_bits(bits):
    with pytest.raises(InputError, match="bits must be 4 or 8"):
        GroupWiseQuantizer(6, bits=bits)
    with pytest.raises(InputError, match="bits must be 4 or 8"):
        ComplexQuantizer(6, bits=bits)


def test_impossible_number_of_channels():
    with pytest.raises(InputError, match="num_channels must be at least 1"):
        GroupWiseQuantizer(0)


def test_impossible_observers():
    with pytest.raises(InputError, match=r"unknown observer 'entropy'.*minmax.*auto"):
        GroupWiseQuantizer(6, observer="entropy")
    percentiles: list[Any] = [0, -1, 101, math.nan, True, "99"]
    for percentile in percentiles:
        with pytest.raises(InputError, match="percentile must"):
            ComplexQuantizer(6, observer="percentile", percentile=percentile)


# ---- learned scales ------------------------------------------------------------------------


def test_learned_scales_equal_stored_ones():
    x = torch.randn(100, 6)
    stored, learned = GroupWiseQuantizer(6, 4, 4), GroupWiseQuantizer(6, 4, 4, learnable=True)
    stored.calibrate(x)
    learned.calibrate(x)
    assert torch.equal(stored.scales, learned.scales)
    assert not list(stored.parameters())
    assert [name for name, _ in learned.named_parameters()] == ["log_scales"]


def test_gradients_reach_the_input_and_the_scales():
    quantizer = calibrated(learnable=True)
    x = torch.randn(10, 6, requires_grad=True)
    quantizer.fake_quantize(x).square().sum().backward()
    assert x.grad is not None
    assert x.grad.abs().min() > 0
    assert quantizer.log_scales.grad.abs().min() > 0


@pytest.mark.parametrize("symmetric", [True, False])
def test_training_the_scales_lowers_the_error(symmetric):
    quantizer = calibrated(bits=4, learnable=True, symmetric=symmetric)
    with torch.no_grad():
        quantizer.log_scales.add_(math.log(3.0))
    x = torch.randn(500, 6) + 0.5
    optimizer = torch.optim.Adam(quantizer.parameters(), lr=0.05)
    losses = []
    for _ in range(60):
        loss = (quantizer.fake_quantize(x) - x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    # Steps three times too long have nine times the error of a uniform code.
    assert losses[-1] < 0.4 * losses[0]


@pytest.mark.parametrize("rate", [1e2, 1e5])
def test_wild_optimizer_steps_leave_scales_positive_and_finite(rate):
    quantizer = calibrated(learnable=True)
    optimizer = torch.optim.SGD(quantizer.parameters(), lr=rate)
    x = torch.randn(100, 6)
    for sign in (1, -1, 1, 1, -1):
        optimizer.zero_grad()
        (sign * quantizer.fake_quantize(x).square().mean()).backward()
        optimizer.step()
        assert (quantizer.scales > 0).all()
        assert torch.isfinite(quantizer.scales).all()
        assert torch.isfinite(quantizer.fake_quantize(x)).all()
        assert torch.isfinite(quantizer.log_scales).all()


@pytest.mark.parametrize("log_scale", [-1e4, -87.0, -60.0, 79.9, 1e4])
def test_a_scale_at_the_limits_gives_no_nan(log_scale):
    quantizer = calibrated(learnable=True)
    with torch.no_grad():
        quantizer.log_scales.fill_(log_scale)
    x = torch.randn(10, 6, requires_grad=True)
    loss = quantizer.fake_quantize(x).sum()
    loss.backward()
    for tensor in (loss, x.grad, quantizer.log_scales.grad):
        assert tensor is not None
        assert torch.isfinite(tensor).all()


def test_freezing_keeps_every_bit():
    quantizer = calibrated(bits=4, learnable=True)
    with torch.no_grad():
        quantizer.log_scales.add_(0.1 * torch.randn_like(quantizer.log_scales))
    x = torch.randn(50, 6)
    scales, restored = quantizer.scales.detach(), quantizer.fake_quantize(x).detach()
    quantizer.freeze()
    quantizer.freeze()
    assert not quantizer.learnable
    assert not list(quantizer.parameters())
    assert torch.equal(quantizer.scales, scales)
    assert torch.equal(quantizer.fake_quantize(x), restored)


# ---- state ---------------------------------------------------------------------------------


def build_group() -> GroupWiseQuantizer:
    return GroupWiseQuantizer(6, 4, 4, symmetric=False, learnable=True)


def build_complex() -> ComplexQuantizer:
    return ComplexQuantizer(6, bits=4, group_size=4, learnable=True)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("build", [build_group, build_complex])
def test_state_dict_round_trip(build, frozen):
    is_complex = build is build_complex
    x = torch.randn(50, 6, dtype=torch.complex64 if is_complex else torch.float32)
    quantizer, fresh = build(), build()
    quantizer.calibrate(x)
    if frozen:
        quantizer.freeze()
    fresh.load_state_dict(quantizer.state_dict())
    assert fresh.calibrated
    assert torch.equal(fresh.scales, quantizer.scales)
    assert torch.equal(fresh.fake_quantize(x), quantizer.fake_quantize(x))
    assert len(list(fresh.parameters())) == len(list(quantizer.parameters()))
    assert not frozen or not list(fresh.parameters())


@pytest.mark.parametrize("learnable", [False, True])
@pytest.mark.parametrize(
    ("options", "method"),
    [({}, "mae"), ({"norm": 2}, "mse"), ({"observer": "minmax"}, "minmax")],
)
def test_what_calibration_found_is_remembered(options, method, learnable):
    build = lambda: GroupWiseQuantizer(6, 4, 4, learnable=learnable, **options)  # noqa: E731
    quantizer, fresh = build(), build()
    assert quantizer.method is None
    assert quantizer.values_seen == 0
    assert math.isnan(quantizer.clipped_share)
    x = torch.randn(500, 6)
    quantizer.observe(x[:200])
    quantizer.observe(x[200:])
    quantizer.end_calibration()
    fresh.load_state_dict(quantizer.state_dict())
    fresh.half()
    for each in (quantizer, fresh):
        assert each.method == method
        assert each.values_seen == 3000
        scale = each.scales.repeat_interleave(4)[:6]
        codes = x / scale
        clipped = ((codes < -8.5) | (codes > 7.5)).float().mean()
        # One or two values of 3,000 may share the bin with the end of the range.
        assert each.clipped_share == pytest.approx(float(clipped), abs=2 / 3000)
        assert (each.clipped_share == 0) == (method == "minmax")


def test_the_percentile_rules_its_range():
    x = torch.randn(2000, 6)
    scales = []
    for percentile in (90.0, 99.0, 100.0):
        quantizer = GroupWiseQuantizer(6, 6, observer="percentile", percentile=percentile)
        quantizer.calibrate(x)
        scales.append(quantizer.scales.item())
    assert scales[0] < scales[1] < scales[2]


def test_an_uncalibrated_state_dict_stays_uncalibrated():
    fresh = build_group()
    fresh.load_state_dict(build_group().state_dict())
    assert not fresh.calibrated


def test_a_state_dict_of_another_size_is_refused():
    with pytest.raises(RuntimeError, match="size mismatch"):
        GroupWiseQuantizer(6, 2, 8).load_state_dict(calibrated().state_dict())


@pytest.mark.parametrize("learnable", [True, False])
def test_double_and_deepcopy(learnable):
    quantizer = calibrated(bits=4, symmetric=False, learnable=learnable)
    x = torch.randn(50, 6)
    expected = quantizer.fake_quantize(x)
    for other in (copy.deepcopy(quantizer), copy.deepcopy(quantizer).double()):
        assert torch.equal(other.scales, quantizer.scales)
        assert torch.equal(other.fake_quantize(x), expected)
    assert quantizer.fake_quantize(x.double()).dtype == torch.float64


@pytest.mark.parametrize(("symmetric", "size"), [(True, 2), (False, 3)])
def test_storage_bytes_are_those_of_the_parameters(symmetric, size):
    quantizer = calibrated(symmetric=symmetric)
    assert quantizer.stored_scales.element_size() == 2
    assert quantizer.zero_points.element_size() == 1
    assert quantizer.storage_bytes == 2 * size


def test_repr():
    assert "6, group_size=4, bits=8, symmetric" in repr(calibrated())


def test_a_state_without_scales_takes_them_away():
    quantizer, empty = (GroupWiseQuantizer(8, 4) for _ in range(2))
    quantizer.calibrate(torch.randn(50, 8))
    assert quantizer.calibrated
    quantizer.load_state_dict(empty.state_dict())
    assert not quantizer.calibrated
    with pytest.raises(LifecycleError, match="no scales yet"):
        quantizer.fake_quantize(torch.randn(2, 8))


@pytest.mark.parametrize("learnable", [False, True])
@pytest.mark.parametrize("group_size", [17, 3 * 10**8, 2**63 - 1, 2**70])
def test_a_group_size_beyond_the_channels_is_one_group(group_size, learnable):
    results = []
    for size in (group_size, 16):
        torch.manual_seed(0)
        quantizer = calibrated(16, size, learnable=learnable, nonuniform=learnable)
        assert (quantizer.group_size, quantizer.num_groups) == (16, 1)
        x = torch.randn(5, 16, requires_grad=True)
        out = quantizer.fake_quantize(x)
        leaves = [x, *quantizer.parameters()]
        results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert ComplexQuantizer(16, group_size=group_size).num_groups == 1
