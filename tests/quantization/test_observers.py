"""Calibration histograms: bounded memory, no lost counts, ranges near the best."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bkcore.errors import CalibrationError
from bkcore.quantization import affine
from bkcore.quantization.observers import BINS, HistogramObserver, affine_from_range


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def observed(*batches: Tensor) -> HistogramObserver:
    """An observer of (M,) batches as one group."""
    observer = HistogramObserver(1)
    for batch in batches:
        observer.observe(batch[:, None], torch.zeros(1, dtype=torch.int64))
    return observer


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


def tensor_bytes(observer: HistogramObserver) -> int:
    tensors = [value for value in vars(observer).values() if isinstance(value, Tensor)]
    other = [value for value in vars(observer).values() if not isinstance(value, Tensor)]
    assert not any(hasattr(value, "__len__") for value in other)
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def test_memory_does_not_grow_with_the_batches():
    groups = torch.arange(6) // 3
    observer = HistogramObserver(2)
    observer.observe(torch.randn(8, 6), groups)
    size = tensor_bytes(observer)
    for step in range(1000):
        observer.observe(torch.randn(8, 6) * (1 + step), groups)
    assert observer.counts.shape == (2, BINS)
    assert tensor_bytes(observer) == size
    assert observer.counts.sum(1).tolist() == [1001 * 8 * 3] * 2


def test_doubling_the_range_loses_no_counts():
    batches = [torch.randn(500) * 10.0**power for power in range(-6, 7)]
    observer = observed(*batches)
    everything = torch.cat(batches)
    assert observer.counts.sum() == everything.numel()
    assert observer.low.item() == everything.min()
    assert observer.high.item() == everything.max()
    assert observer.half_range.item() >= everything.abs().max()
    assert observer.half_range.item() < 2 * everything.abs().max()


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 2, 1, 0], [2, 0, 3, 1]])
def test_the_order_of_batches_does_not_matter(order):
    batches = [torch.randn(1000) * 8.0**power for power in range(-2, 2)]
    expected = observed(torch.cat(batches))
    found = observed(*(batches[i] for i in order))
    assert torch.equal(found.counts, expected.counts)
    assert torch.equal(found.half_range, expected.half_range)
    assert torch.equal(torch.cat((found.low, found.high)), torch.cat((expected.low, expected.high)))


def test_counts_lie_where_the_values_are():
    x = torch.randn(5000)
    observer = observed(x)
    edges = torch.linspace(-1, 1, BINS + 1, dtype=torch.float64) * observer.half_range
    expected = torch.histogram(x.double(), edges).hist.long()
    # A value within a rounding of an edge may fall on either side: a handful in 5000.
    assert (observer.counts[0] - expected).abs().sum() <= 4


def test_groups_do_not_mix():
    groups = torch.tensor([0, 0, 1, 1, 1])
    x = torch.randn(300, 5) * torch.tensor([1.0, 1.0, 50.0, 50.0, 50.0])
    observer = HistogramObserver(2)
    observer.observe(x, groups)
    for group, columns in enumerate((slice(0, 2), slice(2, 5))):
        alone = observed(x[:, columns].flatten())
        assert torch.equal(observer.counts[group], alone.counts[0])
        assert observer.low[group] == alone.low[0]
        assert observer.high[group] == alone.high[0]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 3e38])
def test_values_that_are_not_finite_are_refused_and_nothing_is_counted(bad):
    observer = observed(torch.randn(100))
    before = {name: value.clone() for name, value in vars(observer).items()}
    with pytest.raises(CalibrationError, match="1 of 100 calibration values"):
        observer.observe(
            torch.cat((100 * torch.randn(99), torch.tensor([bad])))[:, None],
            torch.zeros(1, dtype=torch.int64),
        )
    assert all(torch.equal(value, before[name]) for name, value in vars(observer).items())


def test_no_data_has_no_range():
    with pytest.raises(CalibrationError, match="saw no data"):
        HistogramObserver(3).search(8, True, 1)
    observer = observed(torch.zeros(0))
    assert observer.empty
    with pytest.raises(CalibrationError, match="saw no data"):
        observer.search(8, True, 1)


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
