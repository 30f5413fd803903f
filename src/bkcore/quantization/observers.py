"""Calibration: what range the values of a group take, in memory that does not grow.

Each group has a histogram over [-R, R] with R a power of two. When a value falls outside, R is
doubled and neighbouring bins are joined, which loses nothing but resolution. The range of the
codes is then searched on the histogram, because the extremes are a poor range: on v ~ N(0, 1) the
range that minimizes the mean absolute error has a third less error than min-max at 8 bits and
half at 4.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bkcore.errors import CalibrationError
from bkcore.quantization import affine

BINS = 2048
_CANDIDATES = 32
_GROUPS_AT_ONCE = 64
_LARGEST = 2.0**115
"""4e34: what is computed from larger values, such as the width of a range, may not be a float32."""


class HistogramObserver:
    """Histograms of `num_groups` groups of values; memory is num_groups x BINS counts."""

    def __init__(self, num_groups: int) -> None:
        self.counts = torch.zeros(num_groups, BINS, dtype=torch.int64)
        self.half_range = torch.full((num_groups,), 2.0**-126, dtype=torch.float64)
        self.low = torch.full((num_groups,), torch.inf)
        self.high = torch.full((num_groups,), -torch.inf)

    @property
    def empty(self) -> bool:
        """True until a value was observed."""
        return not bool(self.counts.any())

    def observe(self, x: Tensor, group_of_channel: Tensor) -> None:
        """Count the values of x (..., C); channel c belongs to group `group_of_channel[c]`.

        Raises:
            CalibrationError: if x holds NaN, infinity or values near float32's limit; nothing of
                it is counted then.
        """
        values = x.detach().reshape(-1, x.shape[-1]).float().cpu()
        if values.shape[0] == 0:
            return
        usable = values.abs() <= _LARGEST
        if not bool(usable.all()):
            bad = values.numel() - int(usable.sum())
            raise CalibrationError(
                f"{bad} of {values.numel()} calibration values are NaN, infinite or beyond "
                f"{_LARGEST:.0e}; check the data, or the model that made them"
            )
        groups = group_of_channel.cpu()
        self.low.scatter_reduce_(0, groups, values.amin(0), "amin")
        self.high.scatter_reduce_(0, groups, values.amax(0), "amax")
        self._widen()
        half = self.half_range[groups].float()
        bins = ((values / half + 1) * (BINS / 2)).long().clamp_(0, BINS - 1)
        flat = (bins + groups * BINS).flatten()
        self.counts += torch.bincount(flat, minlength=self.counts.numel()).view_as(self.counts)

    def _widen(self) -> None:
        """Double the half range of every group until it holds the extremes seen so far."""
        extreme = torch.maximum(-self.low, self.high).double().clamp(min=2.0**-126)
        target = torch.exp2(torch.ceil(torch.log2(extreme)))
        doublings = torch.log2(target / self.half_range).clamp(min=0)
        occupied = self.counts.any(dim=1)
        for _ in range(int(doublings[occupied].max()) if bool(occupied.any()) else 0):
            rows = (occupied & (self.half_range < target)).nonzero().flatten()
            self.counts[rows] = _join_neighbours(self.counts[rows])
            self.half_range[rows] *= 2
        self.half_range = torch.maximum(self.half_range, target)

    def search(self, bits: int, symmetric: bool, norm: int) -> tuple[Tensor, Tensor]:
        """Scales (float32, storable) and zero points (int8) that minimize the mean |error|^norm.

        Raises:
            CalibrationError: if nothing was observed.
        """
        if self.empty:
            raise CalibrationError(
                "calibration saw no data; run forward passes between start_calibration() and "
                "end_calibration()"
            )
        parts = [
            _search_group_ranges(self, slice(i, i + _GROUPS_AT_ONCE), bits, symmetric, norm)
            for i in range(0, len(self.low), _GROUPS_AT_ONCE)
        ]
        scales, zero_points = zip(*parts, strict=True)
        return torch.cat(scales), torch.cat(zero_points)


def _join_neighbours(counts: Tensor) -> Tensor:
    """Histograms over [-R, R] as histograms over [-2R, 2R] with as many bins."""
    joined = torch.zeros_like(counts)
    joined[:, BINS // 4 : 3 * BINS // 4] = counts.view(-1, BINS // 2, 2).sum(-1)
    return joined


def affine_from_range(
    low: Tensor, high: Tensor, bits: int, symmetric: bool
) -> tuple[Tensor, Tensor]:
    """Storable float32 scale and float zero point of the code range [low, high], elementwise.

    An asymmetric range is first widened toward zero until a zero point of one byte can place it:
    until it holds zero at 8 bits, and up to 8/9 of the way at 4. A range that is only zero gets
    the scale 1.
    """
    qmin, qmax = affine.code_range(bits)
    if symmetric:
        width = torch.maximum(-low, high) / qmax
        zero_point = torch.zeros_like(low)
    else:
        nearest = (qmin + 128) / (qmax + 128)
        low, high = torch.minimum(low, nearest * high), torch.maximum(high, nearest * low)
        width = (high - low) / (qmax - qmin)
    scale = affine.storable(torch.where(width > 0, width, torch.ones_like(width)))
    if not symmetric:
        zero_point = torch.round(qmin - low / scale).clamp(-128, 127)
    return scale, zero_point


def _search_group_ranges(
    observer: HistogramObserver, groups: slice, bits: int, symmetric: bool, norm: int
) -> tuple[Tensor, Tensor]:
    """Shrink the observed range of each group while its error falls."""
    counts = observer.counts[groups]
    used = counts.any(dim=0).nonzero().flatten()
    first, last = int(used[0]), int(used[-1]) + 1
    weights = counts[:, first:last].float()
    centers = (torch.arange(first, last) + 0.5) * (2 / BINS) - 1
    half = observer.half_range[groups].float()[:, None]
    values = centers * half

    def error(low: Tensor, high: Tensor) -> Tensor:
        """Summed |error|^norm of candidate ranges: (G, C) -> (G, C)."""
        scale, zero = affine_from_range(low, high, bits, symmetric)
        columns = []
        for s, z in zip(scale.unbind(1), zero.unbind(1), strict=True):
            restored = affine.fake_quantize(values, s[:, None], z[:, None], bits)
            # Relative to the range, so that no power of it leaves float32.
            errors = ((restored - values) / half).abs()
            columns.append((errors**norm * weights).sum(1))
        return torch.stack(columns, dim=1)

    # Every batch reaches every group, so that none is without data.
    low, high = observer.low[groups], observer.high[groups]
    if symmetric:
        high = torch.maximum(-low, high)
        low = -high
        fractions = _fractions(bits)
        best = error(low[:, None] * fractions, high[:, None] * fractions).argmin(1)
        return _finish(low * fractions[best], high * fractions[best], bits, symmetric)
    for _ in range(2):
        low, high = _shrink_one_end(low, high, error, bits, move_low=False)
        low, high = _shrink_one_end(low, high, error, bits, move_low=True)
    return _finish(low, high, bits, symmetric)


def _fractions(bits: int) -> Tensor:
    """Fractions of the observed range to try; coarse codes gain from cutting deeper."""
    return torch.linspace(1.0, 0.15 if bits == 4 else 0.3, _CANDIDATES)


def _shrink_one_end(
    low: Tensor,
    high: Tensor,
    error: Callable[[Tensor, Tensor], Tensor],
    bits: int,
    *,
    move_low: bool,
) -> tuple[Tensor, Tensor]:
    """Move one end of the ranges [low, high], each (G,), to where the error is least."""
    width = (high - low)[:, None] * _fractions(bits)
    lows = high[:, None] - width if move_low else low[:, None].expand_as(width)
    highs = high[:, None].expand_as(width) if move_low else low[:, None] + width
    best = error(lows, highs).argmin(1, keepdim=True)
    return lows.gather(1, best).squeeze(1), highs.gather(1, best).squeeze(1)


def _finish(low: Tensor, high: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    scale, zero_point = affine_from_range(low, high, bits, symmetric)
    return scale, zero_point.to(torch.int8)
