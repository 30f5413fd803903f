"""Rounding of channels: bit for bit what the one rounding function gives."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bkcore.errors import DTypeError, InputError, ShapeError
from bkcore.kernels import round_channels, round_channels_straight_through, round_rows, use_backend
from bkcore.kernels.backends.cpu import native
from bkcore.kernels.backends.reference.codes import quantize_rows
from bkcore.quantization import GroupWiseQuantizer, affine, levels

ISAS = native.supported_isas()


def problem(rows, channels, group_size, seed):
    generator = torch.Generator().manual_seed(seed)
    groups = -(-channels // group_size)
    scale = torch.logspace(-30, 30, groups).mul(0.013).bfloat16()
    zero = torch.randint(-128, 128, (groups,), generator=generator, dtype=torch.int8)
    each = scale.float().repeat_interleave(group_size)[:channels]
    x = torch.randn(rows, channels, generator=generator) * 100 * each
    halfway = torch.randint(-200, 200, x.shape, generator=generator) + 0.5
    special = torch.tensor([0.0, -0.0, torch.nan, torch.inf, -torch.inf, 1e38, -1e-40])
    kind = torch.randint(0, 10, x.shape, generator=generator)
    x = torch.where(kind < 2, halfway * each, x)
    return torch.where(kind > 2, x, special[kind % 7]), scale, zero


@settings(max_examples=100)
@given(
    rows=st.integers(0, 9),
    channels=st.integers(1, 70),
    group_size=st.integers(1, 80),
    bits=st.sampled_from([4, 8]),
    seed=st.integers(0, 2**16),
)
def test_every_instruction_set_equals_fake_quantize(rows, channels, group_size, bits, seed):
    x, scale, zero = problem(rows, channels, group_size, seed)
    zero = zero.clamp(*affine.code_range(bits))
    each = torch.arange(channels) // group_size
    expected = affine.fake_quantize(x, scale.float()[each], zero[each], bits)

    def same(out):
        return torch.allclose(out, expected, rtol=0, atol=0, equal_nan=True)

    for isa in ISAS:
        with native.use_isa(isa):
            assert same(round_channels(x, scale, zero, group_size, bits))
    with use_backend("reference"):
        assert same(round_channels(x, scale, zero, group_size, bits))


@settings(max_examples=60)
@given(
    rows=st.integers(0, 9),
    channels=st.integers(1, 70),
    group_size=st.integers(1, 80),
    bits=st.sampled_from([4, 8]),
    seed=st.integers(0, 2**16),
)
def test_every_instruction_set_finds_the_nearest_level(rows, channels, group_size, bits, seed):
    x, scale, zero = problem(rows, channels, group_size, seed)
    low, high = affine.code_range(bits)
    zero = zero.clamp(low, high)
    generator = torch.Generator().manual_seed(seed)
    # On a grid of 1/16, so that bounds are exact, and many numbers halfway between two levels.
    steps = torch.randint(1, 33, (2**bits,), generator=generator)
    table = low + steps.cumsum(0) / 16
    each = torch.arange(channels) // group_size
    s, z = scale.float()[each], zero[each].float()
    between = (table[:-1] + table[1:]) / 2
    some = between[torch.randint(0, len(between), x.shape, generator=generator)]
    x = torch.where(torch.rand(x.shape, generator=generator) < 0.3, (some - z) * s, x)
    distance = ((x / s + z).double()[..., None] - table.double()).abs()
    # argmin takes the first of equals, which is the lower one; no level is near infinity or NaN.
    nearest = torch.where((x / s).isinf(), (x > 0) * (len(table) - 1), distance.argmin(-1))
    expected = torch.where(x.isnan(), x, s * (table[nearest] - z))

    def same(out):
        return torch.allclose(out, expected, rtol=0, atol=0, equal_nan=True)

    for isa in ISAS:
        with native.use_isa(isa):
            assert same(round_channels(x, scale, zero, group_size, bits, levels=table))
    with use_backend("reference"):
        assert same(round_channels(x, scale, zero, group_size, bits, levels=table))


@settings(max_examples=60)
@given(
    rows=st.integers(0, 140),
    channels=st.integers(1, 40),
    group_size=st.integers(1, 50),
    bits=st.sampled_from([4, 8]),
    tabled=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_the_adjoint_equals_that_of_plain_pytorch(rows, channels, group_size, bits, tabled, seed):
    generator = torch.Generator().manual_seed(seed)
    groups = -(-channels // group_size)
    low, high = affine.code_range(bits)
    scale = affine.storable(0.1 + torch.rand(groups, generator=generator)).requires_grad_()
    zero = torch.randint(low, high + 1, (groups,), generator=generator).to(torch.int8)
    each = torch.arange(channels) // group_size
    x = torch.randn(rows, channels, generator=generator) * 1.3 * high * scale.detach()[each]
    table = None
    if tabled:
        steps = 0.5 + torch.rand(2**bits, generator=generator)
        table = (low - 1 + steps.cumsum(0)).requires_grad_()
    inputs = [x.requires_grad_(), scale, *([] if table is None else [table])]
    grad = torch.randn(x.shape, generator=generator)

    # In float64 where rounding is exact in both, so that only sums are rounded.
    wide = [y.detach().double().requires_grad_() for y in inputs]
    s, z = wide[1][each], zero[each].double()
    if table is None:
        out = affine.fake_quantize(wide[0], s, z, bits)
    else:
        out = levels.fake_quantize(wide[0], s, z, wide[2])
    expected = torch.autograd.grad(out, wide, grad.double())
    for name in ("reference", *ISAS):
        isa = native.use_isa(name) if name in ISAS else nullcontext()
        with use_backend("reference" if name == "reference" else "cpu"), isa:
            found = round_channels_straight_through(x, scale, zero, group_size, bits, levels=table)
            got = torch.autograd.grad(found, inputs, grad)
        # A number within rounding of a bound may fall on its other side: at most a few do.
        moved = (got[0] - expected[0]).abs() > 1e-5
        assert moved.float().mean() < 0.01 if moved.numel() > 200 else moved.sum() <= 1
        if not moved.any() and torch.allclose(found.double(), out, rtol=1e-4, atol=1e-4):
            for a, b in zip(got[1:], expected[1:], strict=True):
                # Sums of up to 140 x 40 numbers of size 2^bits, each rounded.
                size = 2.0**bits * max(1, rows * channels) ** 0.5
                assert (a - b).abs().max() <= 1e-5 * size


def test_the_adjoint_does_not_depend_on_threads():
    x, scale, zero = problem(1000, 64, 4, 0)
    x = torch.nan_to_num(x, posinf=1, neginf=-1)
    results, threads = [], torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            leaves: list[Any] = [x.clone().requires_grad_(), scale.float().requires_grad_()]
            levels_ = torch.arange(16.0, requires_grad=True)
            out = round_channels_straight_through(leaves[0], leaves[1], zero, 4, 4, levels=levels_)
            results.append(torch.autograd.grad(out, [*leaves, levels_], torch.cos(x)))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_the_adjoint_has_a_fake_form():
    x, scale, zero = problem(3, 40, 16, 0)
    x = torch.nan_to_num(x)
    for table in (None, torch.arange(16.0)):
        torch.library.opcheck(
            torch.ops.bkcore.round_channels_backward.default,
            (torch.ones_like(x), x, scale, zero, table, 16, 4),
            test_utils=("test_schema", "test_faketensor"),
        )


def test_levels_that_do_not_fit_are_refused():
    x, scale, zero = problem(3, 40, 16, 0)
    with pytest.raises(ShapeError, match=r"levels must be \(256,\)"):
        round_channels(x, scale, zero, 16, 8, levels=torch.arange(16.0))
    with pytest.raises(DTypeError, match=r"levels must be torch\.float32.*not torch\.float64"):
        round_channels(x, scale, zero, 16, 4, levels=torch.arange(16.0).double())


@pytest.mark.parametrize("nonuniform", [False, True])
def test_a_stored_quantizer_rounds_as_the_learned_one(nonuniform):
    torch.manual_seed(0)
    quantizer = GroupWiseQuantizer(40, 16, 4, learnable=True, nonuniform=nonuniform)
    x = torch.randn(5, 7, 40) ** 3
    quantizer.calibrate(x)
    with torch.no_grad():
        learned = quantizer.fake_quantize(2 * x)
        quantizer.freeze()
        assert torch.equal(quantizer.fake_quantize(2 * x), learned)
        if nonuniform:
            assert quantizer.table is not None
            quantizer.table.stored_levels[0] -= 1  # not what was looked up before
            assert not torch.equal(quantizer.fake_quantize(2 * x), learned)


@pytest.mark.parametrize("learnable", [False, True])
def test_a_quantizer_rounds_alike_with_and_without_a_derivative(learnable):
    torch.manual_seed(0)
    quantizer = GroupWiseQuantizer(40, 16, bits=4, symmetric=False, learnable=learnable)
    x = 3 * torch.randn(5, 7, 40) + 1
    quantizer.calibrate(x)
    outside = 2 * x.requires_grad_()
    with_derivative = quantizer.fake_quantize(outside)
    assert with_derivative.requires_grad
    (gradient,) = torch.autograd.grad(with_derivative.sum(), outside)
    clipped = quantizer.clips(outside)
    assert clipped.any()
    # In steps of its scale, times the scale: two roundings away from 1.
    torch.testing.assert_close(gradient, (~clipped).float(), rtol=2.0**-22, atol=0)
    with torch.no_grad():
        assert torch.equal(quantizer.fake_quantize(outside), with_derivative)
        strided = outside.transpose(0, 1)
        assert torch.equal(quantizer.fake_quantize(strided), with_derivative.transpose(0, 1))
        half = outside.bfloat16()
        assert torch.equal(quantizer.fake_quantize(half), quantizer.fake_quantize(half.float()))


def test_threads_change_nothing():
    x, scale, zero = problem(300, 64, 4, 0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    alone = round_channels(x, scale, zero, 4, 8)
    torch.set_num_threads(3)
    try:
        together = round_channels(x, scale, zero, 4, 8)
    finally:
        torch.set_num_threads(threads)
    assert torch.allclose(together, alone, rtol=0, atol=0, equal_nan=True)


def test_tensors_that_do_not_fit_are_refused():
    x, scale, zero = problem(3, 40, 16, 0)
    with pytest.raises(InputError, match="bits must be 4 or 8, not 2"):
        round_channels(x, scale, zero, 16, 2)
    with pytest.raises(InputError, match="group_size must be an integer >= 1"):
        round_channels(x, scale, zero, 0, 8)
    with pytest.raises(ShapeError, match=r"scale must be \(4,\)"):
        round_channels(x, scale, zero, 10, 8)
    with pytest.raises(DTypeError, match=r"scale must be torch\.bfloat16"):
        round_channels(x, scale.float(), zero, 16, 8)
    with pytest.raises(DTypeError, match=r"x must be torch\.float32"):
        round_channels(x.double(), scale, zero, 16, 8)
    with pytest.raises(ShapeError, match="axis of channels"):
        round_channels(x[0, 0], scale, zero, 16, 8)


def test_it_has_a_fake_form():
    x, scale, zero = problem(3, 40, 16, 0)
    torch.library.opcheck(
        torch.ops.bkcore.round_channels.default,
        (torch.nan_to_num(x), scale, zero, None, 16, 8),
        test_utils=("test_schema", "test_faketensor"),
    )


@settings(max_examples=60)
@given(rows=st.integers(0, 70), count=st.integers(1, 130), seed=st.integers(0, 2**16))
def test_rows_are_rounded_to_the_codes_of_products(rows, count, seed):
    generator = torch.Generator().manual_seed(seed)
    x = (
        torch.randn(rows, count, generator=generator)
        * torch.logspace(-40, 30, max(rows, 1))[:rows, None]
    )
    special = torch.randint(0, 20, (rows,), generator=generator)
    for row, kind in enumerate(special.tolist()):
        if kind < 4:
            x[row, kind % count] = (torch.nan, torch.inf, -torch.inf, 0.0)[kind]
    codes, scale = quantize_rows(x)
    expected = codes * scale
    for isa in ISAS:
        with native.use_isa(isa):
            assert torch.allclose(round_rows(x), expected, rtol=0, atol=0, equal_nan=True)
            strided = round_rows(x.t().contiguous().t())
            assert torch.allclose(strided, expected, rtol=0, atol=0, equal_nan=True)
    with use_backend("reference"):
        assert torch.allclose(round_rows(x), expected, rtol=0, atol=0, equal_nan=True)


def test_rows_that_do_not_fit_are_refused():
    with pytest.raises(ShapeError, match=r"\(\.\.\., K\) with K >= 1"):
        round_rows(torch.zeros(3, 0))
    with pytest.raises(DTypeError, match=r"torch\.float32, not torch\.float64"):
        round_rows(torch.zeros(3, 2).double())
    torch.library.opcheck(
        torch.ops.bkcore.round_rows.default,
        (torch.randn(2, 3, 5),),
        test_utils=("test_schema", "test_faketensor"),
    )
