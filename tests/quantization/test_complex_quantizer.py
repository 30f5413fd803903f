"""ComplexQuantizer: two real quantizers, one for each part."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bkcore.errors import DTypeError, LifecycleError
from bkcore.quantization import ComplexQuantizer, GroupWiseQuantizer


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("method", ["observe", "calibrate", "quantize", "fake_quantize"])
def test_a_complex_quantizer_refuses_real_values(method):
    quantizer = ComplexQuantizer(6)
    quantizer.calibrate(torch.randn(9, 6, dtype=torch.complex64))
    with pytest.raises(DTypeError, match=r"complex values, not torch.float32; use GroupWise"):
        getattr(quantizer, method)(torch.zeros(2, 6))


def test_complex_before_calibration():
    quantizer = ComplexQuantizer(6)
    assert not quantizer.calibrated
    with pytest.raises(LifecycleError, match=r"calibrate\(\)"):
        quantizer.quantize(torch.zeros(6, dtype=torch.complex64))


def test_a_complex_quantizer_hands_its_observer_to_both_parts():
    quantizer = ComplexQuantizer(6, observer="percentile", percentile=95.0)
    quantizer.calibrate(torch.randn(500, 6, dtype=torch.complex64))
    for part in (quantizer.real, quantizer.imag):
        assert part.method == "percentile"
        assert part.clipped_share == pytest.approx(0.05, abs=0.03)


@settings(max_examples=40)
@given(
    num_channels=st.integers(1, 20),
    group_size=st.integers(1, 24),
    bits=st.sampled_from([4, 8]),
    symmetric=st.sampled_from([None, True, False]),
    per_channel=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_parts_are_quantized_separately(
    num_channels, group_size, bits, symmetric, per_channel, seed
):
    generator = torch.Generator().manual_seed(seed)
    real = torch.randn(30, num_channels, generator=generator)
    imag = 100 * torch.rand(30, num_channels, generator=generator)
    x = torch.complex(real, imag)
    quantizer = ComplexQuantizer(
        num_channels, per_channel, bits, group_size=group_size, symmetric=symmetric
    )
    quantizer.calibrate(x)
    size = group_size if per_channel else num_channels
    assert quantizer.num_channels == num_channels
    assert quantizer.num_groups == math.ceil(num_channels / size)
    assert quantizer.bits == bits
    assert quantizer.scales.shape == (2, quantizer.num_groups)

    expected = []
    for part, symmetric_part in ((real, symmetric is not False), (imag, symmetric is True)):
        alone = GroupWiseQuantizer(num_channels, size, bits, symmetric=symmetric_part)
        alone.calibrate(part)
        expected.append((alone.quantize(part), alone.fake_quantize(part), alone.scales))
    codes = quantizer.quantize(x)
    restored = quantizer.dequantize(*codes)
    assert all(torch.equal(code, part[0]) for code, part in zip(codes, expected, strict=True))
    assert torch.equal(restored, torch.complex(expected[0][1], expected[1][1]))
    assert torch.equal(quantizer.fake_quantize(x), restored)
    assert torch.equal(quantizer.scales, torch.stack([part[2] for part in expected]))


def test_complex_defaults_are_a_scale_per_channel_and_an_asymmetric_imaginary_part():
    quantizer = ComplexQuantizer(num_channels=5, per_channel=True)
    assert quantizer.num_groups == 5
    assert quantizer.bits == 8
    assert quantizer.real.symmetric
    assert not quantizer.imag.symmetric


def test_complex_gradient_reaches_both_parts():
    quantizer = ComplexQuantizer(4, learnable=True)
    x = torch.randn(20, 4, dtype=torch.complex64, requires_grad=True)
    quantizer.calibrate(x.detach())
    quantizer.fake_quantize(x).abs().sum().backward()
    assert x.grad is not None
    assert x.grad.real.abs().sum() > 0
    assert x.grad.imag.abs().sum() > 0
    grads = [parameter.grad for parameter in quantizer.parameters()]
    assert all(grad is not None and grad.abs().sum() > 0 for grad in grads)
