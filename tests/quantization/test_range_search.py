"""Ranges from histograms: near the best that there is, and those that the methods promise."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bkcore.quantization import affine
from bkcore.quantization.observers import METHODS, HistogramObserver
from bkcore.quantization.range_search import affine_from_range
from tests.quantization.histograms import observed


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def mean_error(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int, norm: int) -> float:
    restored = affine.fake_quantize(x, scale, zero_point, bits)
    return float((restored - x).abs().double().pow(norm).mean())


def searched_error(x: Tensor, bits: int, symmetric: bool, norm: int) -> float:
    scale, zero_point = observed(x).search(bits, symmetric, norm)
    return mean_error(x, scale, zero_point, bits, norm)


def min_max_error(x: Tensor, bits: int, symmetric: bool, norm: int) -> float:
    return mean_error(x, *affine_from_range(x.min(), x.max(), bits, symmetric), bits, norm)


def brute_force_error(x: Tensor, bits: int, symmetric: bool, norm: int) -> float:
    """Least error of the raw data over a dense grid of ranges."""
    cuts = torch.linspace(1.0, 0.15, 60)
    if symmetric:
        ranges = [(-x.abs().max() * cut, x.abs().max() * cut) for cut in cuts]
    else:
        ranges = [(x.min() * a, x.max() * b) for a in cuts[::3] for b in cuts[::3]]
    return min(
        mean_error(x, *affine_from_range(low, high, bits, symmetric), bits, norm)
        for low, high in ranges
    )


CONSTANTS = [1.0, -1.0, 0.3, -5.0, 1e6, -1e6, 1e30, 1e-30, -1e-30]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("count", [1, 50])
@pytest.mark.parametrize("value", CONSTANTS)
def test_constant_data_keeps_its_value(value, count, symmetric, bits):
    x = torch.full((count,), value)
    scale, zero_point = observed(x).search(bits, symmetric, 1)
    restored = affine.fake_quantize(x[:1], scale, zero_point, bits)
    assert (restored - x[0]).abs() <= 0.5 * scale
    # One end of the range is the value, so it takes the last code. At 4 bits an asymmetric range
    # needs no zero and is finer still.
    assert scale <= 1.01 * abs(value) / affine.code_range(bits)[1]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_zeros_stay_zero(symmetric, bits):
    scale, zero_point = observed(torch.zeros(7)).search(bits, symmetric, 2)
    assert scale == 1
    assert affine.fake_quantize(torch.zeros(1), scale, zero_point, bits) == 0


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("center", [0.3, 1.0, 10.0, 1e4, -0.3, -10.0])
def test_asymmetric_data_far_from_zero_is_in_range(center, bits):
    """A zero point is one byte, so a narrow range far from zero cannot be met; it is widened."""
    x = center + 0.05 * abs(center) * torch.rand(500)
    scale, zero_point = observed(x).search(bits, False, 1)
    error = (affine.fake_quantize(x, scale, zero_point, bits) - x).abs().max()
    # Widened at worst to [0, max]; bfloat16 scales move that end by 2^-9 of it, and the search
    # may cut a tail where that lowers the mean.
    step = x.abs().max() / 255 if bits == 8 else x.abs().max() / 135
    assert scale <= 1.01 * step
    assert error <= 2 * step


def test_zero_points_fit_a_byte_and_place_the_range():
    low = torch.tensor([-3.0, 0.0, 0.5, 2.0, -2.0, -1.0])
    high = torch.tensor([1.0, 1.0, 1.0, 2.1, -1.9, 0.0])
    for bits in (4, 8):
        scale, zero_point = affine_from_range(low, high, bits, False)
        assert (zero_point == zero_point.to(torch.int8)).all()
        for end in (low, high):
            error = (affine.fake_quantize(end, scale, zero_point, bits) - end).abs()
            # Half a step for rounding the code, half for rounding the zero point, and 2^-9 of the
            # end itself, which lies at most 255 / 2^9 steps of a stored scale away.
            assert (error <= 1.5 * scale).all()


@pytest.mark.parametrize("norm", [1, 2])
@pytest.mark.parametrize("magnitude", [1e-30, 1e-6, 1e6, 1e30])
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_search_does_not_depend_on_the_unit(magnitude, norm, symmetric):
    x = torch.randn(2000)
    ratio = searched_error(magnitude * x, 4, symmetric, norm) / magnitude**norm
    # The bins fall elsewhere (R is a power of two) and the scale has 8 bits: a few percent.
    assert ratio == pytest.approx(searched_error(x, 4, symmetric, norm), rel=0.05)


@pytest.mark.parametrize(("bits", "gain"), [(8, 0.8), (4, 0.65)])
def test_the_searched_range_beats_min_max_on_a_normal_distribution(bits, gain):
    # 2^17 samples reach 4.5 sigma: min-max spends codes on tails that a shorter range clips.
    x = torch.randn(2**17)
    assert searched_error(x, bits, True, 1) < gain * min_max_error(x, bits, True, 1)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("norm", [1, 2])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("name", ["normal", "uniform", "laplace", "skewed"])
def test_the_range_is_as_good_as_brute_force(name, symmetric, norm, bits):
    x = {
        "normal": lambda: torch.randn(20_000),
        "uniform": lambda: torch.rand(20_000) - 0.3,
        "laplace": lambda: torch.distributions.Laplace(0.0, 1.0).sample((20_000,)),
        "skewed": lambda: torch.randn(20_000).exp() - 0.5,
    }[name]()
    # 32 candidate ranges instead of the grid, and bins instead of values, of which an 8-bit step
    # may hold only three: 5 % of the error.
    best = brute_force_error(x, bits, symmetric, norm)
    assert searched_error(x, bits, symmetric, norm) <= 1.05 * best


def test_scales_are_storable():
    scale, _ = observed(torch.randn(1000)).search(8, True, 1)
    assert torch.equal(scale.to(affine.SCALE_DTYPE).float(), scale)


def test_many_groups_equal_each_group_alone():
    x = torch.randn(200, 150) * torch.rand(150).exp()
    observer = HistogramObserver(150)
    observer.observe(x, torch.arange(150))
    scales, zero_points = observer.search(8, False, 1)
    for group in (0, 63, 64, 149):
        scale, zero_point = observed(x[:, group]).search(8, False, 1)
        assert scales[group] == scale[0]
        assert zero_points[group] == zero_point[0]


def test_ranges_go_where_errors_cost():
    x = torch.randn(20000)
    plain, weighted = HistogramObserver(1), HistogramObserver(1)
    zeros = torch.zeros(1, dtype=torch.int64)
    plain.observe(x[:, None], zeros)
    weighted.observe(x[:, None], zeros, (x > 1)[:, None].float())

    def error_above(observer: HistogramObserver) -> float:
        scale, zero_point = observer.search(4, False, 1)
        return float((affine.fake_quantize(x, scale, zero_point, 4) - x)[x > 1].abs().mean())

    assert error_above(weighted) < 0.6 * error_above(plain)


# ---- methods -------------------------------------------------------------------------------


def chosen(x: Tensor, method: str, bits: int = 8, symmetric: bool = True, **options):
    settings_ = {"norm": 2, "percentile": 99.0, **options}
    return observed(x).choose(method, bits, symmetric, **settings_)


def clipped_exactly(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> int:
    qmin, qmax = affine.code_range(bits)
    codes = x.double() / scale.double() + zero_point
    return int(((codes < qmin - 0.5) | (codes > qmax + 0.5)).sum())


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_min_max_reaches_the_extremes_and_clips_nothing(bits, symmetric):
    x = torch.randn(5000).exp() - 1
    choice = chosen(x, "minmax", bits, symmetric)
    scale, zero_point = affine_from_range(x.min()[None], x.max()[None], bits, symmetric)
    assert torch.equal(choice.scales, scale)
    assert torch.equal(choice.zero_points, zero_point.to(torch.int8))
    assert (choice.method, choice.seen, choice.clipped) == ("minmax", 5000, 0)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("percentile", [90.0, 99.0, 99.9])
def test_a_percentile_keeps_that_share_inside(percentile, symmetric):
    x = torch.randn(100_000) + (0 if symmetric else 0.5)  # 8-bit ranges hold zero
    choice = chosen(x, "percentile", 8, symmetric, percentile=percentile)
    share = (100 - percentile) / 100
    if symmetric:
        end = x.abs().quantile(1 - share)
        # The end of a bin, 2^-10 of the histogram's 8, and a bfloat16 scale, 2^-9 of itself.
        margin = 2.0**-7 + 2.0**-8 * float(end)
        assert float(127 * choice.scales[0]) == pytest.approx(float(end), abs=margin)
    low, high = (choice.scales * (end - choice.zero_points.float()) for end in (-128, 127))
    outside = ((x < low) | (x > high)).float().mean()
    assert float(outside) == pytest.approx(share, rel=0.2)


def test_a_hundred_percent_is_min_max():
    x = torch.randn(1000)
    for symmetric in (True, False):
        every = chosen(x, "percentile", 8, symmetric, percentile=100.0)
        assert torch.equal(every.scales, chosen(x, "minmax", 8, symmetric).scales)


@settings(max_examples=50)
@given(
    st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=30),
    st.floats(0.01, 100),
    st.booleans(),
    st.sampled_from([*METHODS, "auto"]),
)
def test_any_data_has_a_range(data, percentile, symmetric, method):
    x = torch.tensor(data)
    choice = chosen(x, method, 4, symmetric, percentile=percentile)
    assert (choice.scales > 0).all()
    assert torch.isfinite(choice.scales).all()
    assert choice.seen == len(x)
    assert 0 <= choice.clipped <= len(x)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bits", [4, 8])
def test_clipped_values_are_counted(bits, method, symmetric):
    x = torch.distributions.Laplace(0.5, 1.0).sample((50_000,))
    choice = chosen(x, method, bits, symmetric)
    exact = clipped_exactly(x, choice.scales, choice.zero_points, bits)
    # The values of the bin that the end falls into.
    assert choice.clipped == pytest.approx(exact, abs=0.001 * len(x))
    assert exact > 0 or method == "minmax"


@pytest.mark.parametrize("norm", [1, 2])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_auto_is_the_best_of_the_methods(symmetric, bits, norm):
    x = torch.randn(20_000).exp() - 0.5
    best = chosen(x, "auto", bits, symmetric, norm=norm)
    errors = {}
    for method in METHODS:
        choice = chosen(x, method, bits, symmetric, norm=norm)
        errors[method] = mean_error(x, choice.scales, choice.zero_points, bits, norm)
    assert best.method in METHODS
    # Errors of bins against errors of values.
    assert errors[best.method] <= 1.02 * min(errors.values())


def test_auto_takes_different_methods_for_different_tensors():
    """Bounded data need their extremes; a normal distribution's tail is better cut."""
    two_valued = torch.tensor([-1.0, 1.0]).repeat(500)
    assert chosen(two_valued, "auto").method == "minmax"
    assert chosen(torch.randn(100_000), "auto", 4).method == "mse"
    assert chosen(torch.randn(100_000), "auto", 4, norm=1).method == "mae"


def test_the_error_is_that_of_the_values():
    x = torch.randn(3000)
    observer = observed(x)
    scale, zero_point = observer.search(4, True, 2)
    for norm in (1, 2):
        expected = len(x) * mean_error(x, scale, zero_point, 4, norm)
        assert observer.error(scale, zero_point, 4, norm) == pytest.approx(expected, rel=0.01)
