"""Calibration histograms: bounded memory, no lost counts, exact merging."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from bkcore.errors import CalibrationError, InputError
from bkcore.quantization.observers import METHODS, HistogramObserver
from bkcore.quantization.range_search import BINS
from tests.quantization.histograms import observed


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


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


# Values on the edges of bins, next to them, and where adding 1 in float32 would round them over.
edges = st.builds(
    lambda bin_, power, ulps, sign: (
        sign
        * float(torch.tensor(bin_ * 2.0**power).view(torch.int32).add(ulps).view(torch.float32))
    ),
    st.integers(1, BINS),
    st.integers(-30, 30),
    st.integers(-3, 3),
    st.sampled_from([-1, 1]),
)
values = st.one_of(edges, st.floats(-(2.0**100), 2.0**100, width=32), st.just(0.0))
columns = st.lists(values, max_size=12)


def same(one: HistogramObserver, other: HistogramObserver) -> bool:
    return all(torch.equal(value, vars(other)[name]) for name, value in vars(one).items())


def merged(*observers: HistogramObserver) -> HistogramObserver:
    total = copy.deepcopy(observers[0])
    for observer in observers[1:]:
        before = copy.deepcopy(observer)
        total.merge(observer)
        assert same(observer, before)
    return total


@settings(max_examples=200)
@given(st.lists(columns, min_size=1, max_size=5))
@example([[1.0], [0.5, -0.5, 2.0]])
@example([[1.0, 0.0009765624], [2.0]])
def test_batches_and_merged_observers_give_the_histogram_of_all_values(batches):
    batches = [torch.tensor(batch) for batch in batches]
    whole = observed(torch.cat(batches))
    assert same(observed(*batches), whole)
    assert same(observed(*reversed(batches)), whole)
    apart = [observed(batch) for batch in batches]
    assert same(merged(*apart), whole)
    assert same(merged(*reversed(apart)), whole)
    assert int(whole.counts.sum()) == sum(len(batch) for batch in batches)


@settings(max_examples=50)
@given(columns, columns, columns)
def test_merging_is_associative_and_commutative(a, b, c):
    a, b, c = (observed(torch.tensor(batch)) for batch in (a, b, c))
    assert same(merged(a, b), merged(b, a))
    assert same(merged(merged(a, b), c), merged(a, merged(b, c)))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("method", [*METHODS, "auto"])
def test_merged_observers_choose_the_same_scales(method, symmetric):
    groups = torch.arange(6) // 3
    x = torch.randn(300, 6) * 10.0 ** torch.arange(-1, 2).repeat_interleave(100)[:, None]
    whole, total = HistogramObserver(2), HistogramObserver(2)
    whole.observe(x, groups)
    for part in x.split(100):
        observer = HistogramObserver(2)
        observer.observe(part, groups)
        total.merge(observer)
    expected, found = (each.choose(method, 4, symmetric, 2, 99.0) for each in (whole, total))
    assert torch.equal(found.scales, expected.scales)
    assert torch.equal(found.zero_points, expected.zero_points)
    assert (found.method, found.seen, found.clipped) == (
        expected.method,
        expected.seen,
        expected.clipped,
    )


def test_observers_of_other_sizes_do_not_merge():
    with pytest.raises(InputError, match="2 groups cannot merge one of 3"):
        HistogramObserver(2).merge(HistogramObserver(3))


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


@pytest.mark.parametrize("method", [*METHODS, "auto"])
def test_no_data_has_no_range_by_any_method(method):
    with pytest.raises(CalibrationError, match="saw no data"):
        HistogramObserver(3).choose(method, 8, True, 2, 99.9)


def test_weights_count_like_so_many_values():
    x = torch.randn(3000)
    weight = torch.randint(0, 5, (3000,)) / 4
    weighted, repeated = HistogramObserver(1), HistogramObserver(1)
    zeros = torch.zeros(1, dtype=torch.int64)
    weighted.observe(x[:, None], zeros, weight[:, None])
    repeated.observe(x.repeat_interleave((4 * weight).long())[:, None], zeros)
    assert torch.equal(4 * weighted.costs, repeated.costs)
    assert weighted.counts.sum() == 3000


def test_weights_survive_merging_and_widening():
    x, weight = 5 * torch.randn(400), torch.rand(400)
    zeros = torch.zeros(1, dtype=torch.int64)
    whole, left, right = (HistogramObserver(1) for _ in range(3))
    whole.observe(x[:, None], zeros, weight[:, None])
    left.observe(x[:150, None], zeros, weight[:150, None])
    right.observe(100 * x[:1, None], zeros, weight[:1, None])
    whole.observe(100 * x[:1, None], zeros, weight[:1, None])
    right.observe(x[150:, None], zeros, weight[150:, None])
    left.merge(right)
    assert torch.equal(left.costs, whole.costs)
    assert torch.equal(left.counts, whole.counts)


@pytest.mark.parametrize("method", [*METHODS, "auto"])
@pytest.mark.parametrize("bits", [4, 8])
def test_groups_that_share_a_zero_point(method, bits):
    torch.manual_seed(0)
    spread = torch.tensor([0.1, 1.0, 1.0, 10.0])
    x = 0.4 + spread * torch.rand(2000, 4)  # ranges that start at quite different shares of the end
    observer = HistogramObserver(4)
    observer.observe(x, torch.arange(4))
    own = observer.choose(method, bits, False, 1, 99.0)
    shared = observer.choose(method, bits, False, 1, 99.0, shared_zero_point=True)
    assert len(shared.zero_points.unique()) == 1
    assert set(shared.zero_points.tolist()) <= set(own.zero_points.tolist())
    if method == "minmax" and bits == 4:  # at 8 a stored scale is off by more than half a code
        assert shared.clipped == 0
    costs = [
        observer.error(own.scales, torch.full((4,), zero).to(torch.int8), bits, 1)
        for zero in own.zero_points.tolist()
    ]
    if method in ("mae", "mse", "auto"):  # the best, each group keeping its upper end
        assert observer.error(shared.scales, shared.zero_points, bits, 1) <= min(costs)


def test_a_zero_point_that_all_groups_would_choose_changes_nothing():
    torch.manual_seed(0)
    observer = HistogramObserver(3)
    observer.observe(torch.rand(500, 1).expand(500, 3), torch.arange(3))
    own, shared = (observer.choose("mae", 4, False, 1, 99.0, share) for share in (False, True))
    assert torch.equal(own.scales, shared.scales)
    assert torch.equal(own.zero_points, shared.zero_points)
