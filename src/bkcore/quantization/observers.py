"""Calibration: find the range of the values of each group, in constant memory.

Each group has a histogram over [-R, R], with R a power of two. When a value falls outside, R is
doubled and neighbouring bins are joined, which only loses resolution. The histogram is always the
one that all values together give, whatever their order and batches. So observers can be merged, and
processes that each see part of the data end up with the same counts.

The range of the codes is then chosen from the histogram by one of `METHODS` (`range_search`).
Errors need not all cost the same: each value may have a weight, and a search then minimizes the
weighted error.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from bkcore.deprecated import moved_names
from bkcore.errors import CalibrationError, InputError
from bkcore.quantization import affine, range_search
from bkcore.quantization.range_search import BINS, Histograms

METHODS = ("minmax", "percentile", "mae", "mse")
"""Ways to choose a range: the extremes; the range that keeps a given percentage of the values; the
range with the least mean absolute error; the one with the least mean squared error."""

WEIGHT_STEPS = 1024
"""Weights are stored as integer multiples of 1 / this, so sums do not depend on the order."""

_SMALLEST = 2.0**-126
_LARGEST = 2.0**115
"""4e34: with larger values, results such as the width of a range might overflow float32."""

__getattr__ = moved_names(__name__)


@dataclass(frozen=True)
class Choice:
    """The range chosen for a tensor.

    Attributes:
        method: one of `METHODS`.
        scales: (num_groups,) float32, storable.
        zero_points: (num_groups,) int8.
        seen: how many values were observed.
        clipped: how many of them lie more than half a step outside the outermost codes; exact up to
            the width of a bin.
    """

    method: str
    scales: Tensor
    zero_points: Tensor
    seen: int
    clipped: int


class HistogramObserver:
    """Histograms of `num_groups` groups of values; memory is 2 x num_groups x BINS integers.

    Attributes:
        counts: int64 (num_groups, BINS), values in each bin.
        costs: int64 (num_groups, BINS), their summed weights in units of 1 / `WEIGHT_STEPS`.
    """

    def __init__(self, num_groups: int) -> None:
        self.counts = torch.zeros(num_groups, BINS, dtype=torch.int64)
        self.costs = torch.zeros_like(self.counts)
        self.half_range = torch.full((num_groups,), _SMALLEST, dtype=torch.float64)
        self.low = torch.full((num_groups,), torch.inf)
        self.high = torch.full((num_groups,), -torch.inf)

    @property
    def empty(self) -> bool:
        """True until a value was observed."""
        return not bool(self.counts.any())

    def observe(self, x: Tensor, group_of_channel: Tensor, weight: Tensor | None = None) -> None:
        """Count the values of x (..., C); channel c belongs to group `group_of_channel[c]`.

        Args:
            weight: the cost of an error of each value, in [0, 1], in the shape of x; None means 1.

        Raises:
            CalibrationError: if x holds NaN, infinity or values near float32's limit; none of it
                is then counted.
        """
        values = x.detach().reshape(-1, x.shape[-1]).float().cpu()
        if values.shape[0] == 0:
            return
        require_usable(values)
        groups = group_of_channel.cpu()
        low = self.low.scatter_reduce(0, groups, values.amin(0), "amin")
        high = self.high.scatter_reduce(0, groups, values.amax(0), "amax")
        extreme = torch.maximum(-low, high).double().clamp(min=_SMALLEST)
        half_range = torch.maximum(self.half_range, torch.exp2(torch.ceil(torch.log2(extreme))))
        bins = _bins(values, half_range[groups].float())
        flat = (bins + groups * BINS).flatten()
        counts = torch.bincount(flat, minlength=self.counts.numel())
        if weight is None:
            costs = counts * WEIGHT_STEPS
        else:
            steps = (weight.detach().reshape(values.shape).double().cpu() * WEIGHT_STEPS).round()
            costs = torch.bincount(flat, steps.flatten(), minlength=len(counts)).long()
        # All replaced at once, never written to: no batch is half counted, and copies stay valid.
        self._widen(half_range)
        self.counts = self.counts + counts.view_as(self.counts)
        self.costs = self.costs + costs.view_as(self.costs)
        self.low, self.high = low, high

    def merge(self, other: HistogramObserver) -> None:
        """Add what another observer saw, exactly as if this one had seen it too.

        Raises:
            InputError: if the other one has a different number of groups.
        """
        if other.counts.shape != self.counts.shape:
            raise InputError(
                f"an observer of {len(self.low)} groups cannot merge one of {len(other.low)}"
            )
        half_range = torch.maximum(self.half_range, other.half_range)
        self._widen(half_range)
        self.counts += _widened(other.counts, other.half_range, half_range)
        self.costs += _widened(other.costs, other.half_range, half_range)
        self.low = torch.minimum(self.low, other.low)
        self.high = torch.maximum(self.high, other.high)

    def merge_processes(self, device: torch.device) -> None:
        """Merge the observers of all processes of `torch.distributed`, if it is initialized.

        Every process must call this, even if it saw nothing; all end with the same observer.

        Args:
            device: for the exchange; the process group's backend must support it.
        """
        if not (dist.is_available() and dist.is_initialized()):
            return

        def reduced(x: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
            x = x.to(device, copy=True)
            dist.all_reduce(x, operation)
            return x.cpu()

        self._widen(reduced(self.half_range, dist.ReduceOp.MAX))
        self.counts = reduced(self.counts, dist.ReduceOp.SUM)
        self.costs = reduced(self.costs, dist.ReduceOp.SUM)
        self.low = reduced(self.low, dist.ReduceOp.MIN)
        self.high = reduced(self.high, dist.ReduceOp.MAX)

    def _widen(self, half_range: Tensor) -> None:
        """Widen every group to at least `half_range`, powers of two."""
        half_range = torch.maximum(self.half_range, half_range)
        self.counts = _widened(self.counts, self.half_range, half_range)
        self.costs = _widened(self.costs, self.half_range, half_range)
        self.half_range = half_range

    def choose(
        self,
        method: str,
        bits: int,
        symmetric: bool,
        norm: int,
        percentile: float,
        shared_zero_point: bool = False,
    ) -> Choice:
        """Choose the range of the codes.

        Args:
            bits: 4 or 8.
            symmetric: whether the zero points are 0.
            norm: 1 or 2, the power of the error.
            method: one of `METHODS`, or "auto": the one with the least mean |error|^norm over the
                whole tensor, measured on the histograms; the first of `METHODS` if several tie.
            percentile: percent of the values that "percentile" keeps inside, in (0, 100].
            shared_zero_point: give all groups the same zero point; for non-negative values.

        Raises:
            CalibrationError: if nothing was observed.
        """
        histograms = self._histograms()
        ranges = {
            name: range_search.find_range(histograms, name, bits, symmetric, percentile)
            for name in (METHODS if method == "auto" else (method,))
        }
        if method == "auto":
            method = min(ranges, key=lambda name: self.error(*ranges[name], bits, norm))
        scales, zero_points = ranges[method]
        if shared_zero_point:
            searched = method in ("mae", "mse")
            scales, zero_points = self._shared(scales, zero_points, bits, norm, searched)
        seen = int(self.counts.sum())
        return Choice(method, scales, zero_points, seen, self.clipped(scales, zero_points, bits))

    def _shared(
        self, scales: Tensor, zero_points: Tensor, bits: int, norm: int, searched: bool
    ) -> tuple[Tensor, Tensor]:
        """The ranges with one zero point for all groups; each keeps its upper end.

        It is one of the groups' own zero points. If the ranges were searched for the least error,
        it is the one with the least error; otherwise it is the greatest, with which no range loses
        its lower end either.
        """
        qmax = affine.code_range(bits)[1]
        highs = scales * (qmax - zero_points.float())

        def sharing(zero: int) -> tuple[Tensor, Tensor]:
            return affine.storable(highs / (qmax - zero)), torch.full_like(zero_points, zero)

        zeros = zero_points.unique().tolist()
        if not searched:
            return sharing(zeros[-1])
        return min(map(sharing, zeros), key=lambda pair: self.error(pair[0], pair[1], bits, norm))

    def error(self, scales: Tensor, zero_points: Tensor, bits: int, norm: int) -> float:
        """Summed weight * |error|^norm of all values, taken at the middle of their bins."""
        values = range_search.bin_centers(self.half_range.float())
        restored = affine.fake_quantize(values, scales[:, None], zero_points[:, None], bits)
        errors = (restored.double() - values.double()).abs()
        return float((errors**norm * self.costs).sum() / WEIGHT_STEPS)

    def clipped(self, scales: Tensor, zero_points: Tensor, bits: int) -> int:
        """How many observed values lie more than half a step outside the outermost codes."""
        qmin, qmax = affine.code_range(bits)
        values = range_search.bin_centers(self.half_range.float())
        codes = values / scales[:, None] + zero_points[:, None]
        outside = (codes < qmin - 0.5) | (codes > qmax + 0.5)
        return int(self.counts[outside].sum())

    def search(self, bits: int, symmetric: bool, norm: int) -> tuple[Tensor, Tensor]:
        """Scales (float32, storable) and zero points (int8) with the least weighted |error|^norm.

        Raises:
            CalibrationError: if nothing was observed.
        """
        return range_search.least_error_range(self._histograms(), bits, symmetric, norm)

    def _histograms(self) -> Histograms:
        if self.empty:
            raise CalibrationError(
                "calibration saw no data; run forward passes between start_calibration() and "
                "end_calibration()"
            )
        return Histograms(self.counts, self.costs, self.half_range, self.low, self.high)


def require_usable(values: Tensor) -> None:
    """Raise `CalibrationError` if values are NaN, infinite or near float32's limit."""
    usable = values.abs() <= _LARGEST
    if not bool(usable.all()):
        bad = values.numel() - int(usable.sum())
        raise CalibrationError(
            f"{bad} of {values.numel()} calibration values are NaN, infinite or beyond "
            f"{_LARGEST:.0e}; check the data, or the model that produced them"
        )


def _bins(values: Tensor, half_range: Tensor) -> Tensor:
    """Bins of values (M, C) in [-R, R], R (C,) powers of two.

    Bins are counted outward from zero, and each includes its outer edge. So doubling R maps whole
    bins to bins, even for values on an edge, and every step here is exact.
    """
    distance = (values.abs() / half_range * (BINS // 2)).ceil().long().sub_(1).clamp_(min=0)
    return torch.where(values < 0, BINS // 2 - 1 - distance, BINS // 2 + distance)


def _widened(counts: Tensor, half_range: Tensor, target: Tensor) -> Tensor:
    """Widen histograms over [-R, R] to [-target, target], with target >= R powers of two."""
    counts = counts.clone()
    doublings = torch.where(counts.any(dim=1), torch.log2(target / half_range), 0).round().long()
    for done in range(int(doublings.max())):
        rows = (doublings > done).nonzero().flatten()
        counts[rows] = _join_neighbours(counts[rows])
    return counts


def _join_neighbours(counts: Tensor) -> Tensor:
    """Widen histograms over [-R, R] to [-2R, 2R], with the same number of bins."""
    joined = torch.zeros_like(counts)
    joined[:, BINS // 4 : 3 * BINS // 4] = counts.view(-1, BINS // 2, 2).sum(-1)
    return joined
