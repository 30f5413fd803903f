"""Unevenly spaced levels: a lookup table for the codes, learned in training.

With scale s and zero point z, code q stands for s * (level of q - z); for evenly spaced codes the
level of q is q itself. x becomes the code whose level is nearest to x / s + z, or the lower one if
two are equally near. All groups of a quantizer share one table.

A table is piecewise linear in the code, as in companded telephony (ITU-T G.711). At 8 bits it has
23 segments with equal steps inside each. Segments are short at the ends, where the density of
values falls off. That takes 48 bytes instead of 512 for 256 free levels. At 4 bits every step is
free.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bkcore.quantization import affine
from bkcore.quantization.observers import HistogramObserver
from bkcore.quantization.range_search import bin_centers
from bkcore.quantization.storage import StoredDtypes

_SEGMENTS = {4: [1] * 15, 8: [1, 2, 4, 8, *[15] * 15, 8, 4, 2, 1]}
"""Number of equal steps in each segment, by bits."""

_SMALLEST_LOG_STEP, _LARGEST_LOG_STEP = -5.0, 4.0
"""In units of the even step: small enough for any density, but levels stay distinct in float32."""

_FARTHEST = 1024.0
"""The largest distance of the first level from 0, in the same units."""

_GRID = 512
"""Cells in which the density of values is measured, each at least two histogram bins wide."""


class LevelTable(StoredDtypes):
    """Ascending levels for all codes of 4 or 8 bits, in units of evenly spaced codes.

    Until `freeze`, the first level and the logarithms of the steps are parameters.

    Attributes:
        first_level: () float32, the level of the lowest code.
        log_steps: float32, (23,) at 8 bits and (15,) at 4: the step of each segment.
    """

    stored = ("stored_levels",)
    written_in_place = ("first_level", "log_steps", "stored_levels")

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = bits
        self._lengths = _SEGMENTS[bits]
        self._known: tuple[Tensor, object, Tensor] | None = None
        self.first_level = nn.Parameter(torch.tensor(torch.nan))
        self.log_steps = nn.Parameter(torch.full((len(self._lengths),), torch.nan))
        self.stored_levels: Tensor

    @property
    def learnable(self) -> bool:
        """True until `freeze`."""
        return "log_steps" in self._parameters

    @property
    def segments(self) -> int:
        """How many steps the table stores."""
        return len(self._lengths)

    @property
    def storage_bytes(self) -> int:
        """Bytes of the stored table: two per step, and two for the first level."""
        return 2 * (1 + self.segments)

    @property
    def values(self) -> Tensor:
        """The levels, float32 (2^bits,), ascending; NaN before `fit`."""
        stored = self._buffers.get("stored_levels")
        if stored is None:
            return self._from_parts(affine.rounded(self._parts()))
        # Decoding needs them at every token; they are recomputed only if the buffer changes.
        if torch.compiler.is_compiling():
            return self._from_parts(stored.float())
        # Inference tensors have no version counter; for these, loading clears the cache, see below.
        version = 0 if stored.is_inference() else stored._version
        now = (stored.data_ptr(), version)
        if self._known is None or self._known[0] is not stored or self._known[1] != now:
            # An ordinary tensor even if the first call is in inference mode: autograd may need it.
            with torch.inference_mode(False):
                self._known = (stored, now, self._from_parts(stored.float()))
        return self._known[2]

    def _from_parts(self, parts: Tensor) -> Tensor:
        first, steps = parts[0], parts[1:]
        lengths = torch.tensor(self._lengths, device=steps.device)
        above = steps.repeat_interleave(lengths, output_size=2**self.bits - 1).cumsum(0)
        return first + torch.cat((above.new_zeros(1), above))

    @torch.no_grad()
    def fit(self, observer: HistogramObserver, scales: Tensor, zeros: Tensor, norm: int) -> None:
        """Choose the levels for the observed values, all groups together.

        For the least mean |error|^p, the density of levels must be proportional to the density of
        the values (here weighted by the cost of their errors) to the power 1 / (1 + p): Panter and
        Dite, "Quantization distortion in pulse-count modulation with nonuniform spacing of levels",
        1951, for p = 2; Gersho and Gray, "Vector Quantization and Signal Compression", section 5.6.

        Args:
            observer: holds the observed values.
            scales, zeros: (num_groups,), of evenly spaced codes.
            norm: p, 1 or 2.
        """
        places = bin_centers(observer.half_range.float()) / scales[:, None] + zeros[:, None]
        # Costs are stored in whole steps and may all round to zero; then all values count equally.
        costs = observer.costs if bool(observer.costs.any()) else observer.counts
        cost = costs.double().flatten()
        places = places.double().flatten()[cost > 0]
        cost = cost[cost > 0]
        low, high = float(places.min()), float(places.max())
        if not low < high:
            low, high = low - 0.5, high + 0.5
        cell = ((places - low) * (_GRID / (high - low))).long().clamp(max=_GRID - 1)
        density = torch.bincount(cell, cost, minlength=_GRID) ** (1 / (1 + norm))
        # Level k lies where the cumulative share is (k + 1/2) / 2^bits.
        share = torch.cat((density.new_zeros(1), density.cumsum(0)))
        share = share / share[-1]
        knots = torch.tensor([0, *self._lengths]).cumsum(0)
        wanted = (knots.double() + 0.5) / 2**self.bits
        above = torch.searchsorted(share, wanted).clamp(1, _GRID)
        rest = (wanted - share[above - 1]) / (share[above] - share[above - 1])
        levels = low + (above - 1 + rest) * ((high - low) / _GRID)
        steps = levels.diff() / torch.tensor(self._lengths)
        log_steps = steps.log().clamp(_SMALLEST_LOG_STEP, _LARGEST_LOG_STEP)
        if self.learnable:
            self.first_level.copy_(levels[0])
            self.log_steps.copy_(log_steps)
        else:
            self._known = None
            self.stored_levels.copy_(torch.cat((levels[:1], log_steps.exp())))

    def freeze(self) -> None:
        """Turn the parameters into a stored table with the same values."""
        if self.learnable:
            stored = self._parts().detach().to(affine.SCALE_DTYPE)
            del self.first_level, self.log_steps
            self.register_buffer("stored_levels", stored)

    def thaw(self) -> None:
        """Turn the stored table into parameters with the same values."""
        if not self.learnable:
            stored = self.stored_levels.float()
            del self.stored_levels
            self._known = None
            self.first_level = nn.Parameter(stored[0].clone())
            self.log_steps = nn.Parameter(stored[1:].log())

    def _parts(self) -> Tensor:
        """The first level and the steps, clamped to valid values whatever an optimizer did."""
        first = self.first_level.clamp(-_FARTHEST, _FARTHEST)
        steps = self.log_steps.clamp(_SMALLEST_LOG_STEP, _LARGEST_LOG_STEP).exp()
        return torch.cat((first[None], steps))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        self._known = None
        if self.learnable and prefix + "stored_levels" in state_dict:
            self.freeze()
        super()._load_from_state_dict(state_dict, prefix, *args)


def nearest(places: Tensor, levels: Tensor) -> Tensor:
    """Index of the level (L,) nearest to each place; the lower one if two are equally near."""
    bounds = levels[:-1] + (levels[1:] - levels[:-1]) / 2
    return torch.searchsorted(bounds.detach(), places.detach().contiguous())


class _NearestLevel(torch.autograd.Function):
    """Round to scale * (level - zero point), straight through; scale and levels are learned."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, levels: Tensor) -> Tensor:
        ratio = x / scale
        places = ratio + zero_point
        index = nearest(places, levels)
        outside = (places < levels[0]) | (places > levels[-1])
        ratio = ratio.masked_fill_(outside, 0)
        ctx.save_for_backward(ratio, outside, index, scale, zero_point, levels)
        chosen = levels.index_select(0, index.flatten()).view_as(places)
        chosen = torch.where(places.isnan(), places, chosen)
        return scale * (chosen - zero_point)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        ratio, outside, index, scale, zero_point, levels = ctx.saved_tensors
        grad = grads[0]
        moved = levels.index_select(0, index.flatten()).view_as(ratio) - zero_point - ratio
        by_levels = torch.zeros_like(levels)
        by_levels.index_add_(0, index.flatten(), (grad * scale).flatten().to(by_levels.dtype))
        by_scale = (grad * moved).sum_to_size(scale.shape)
        return grad.masked_fill(outside, 0), by_scale, None, by_levels


def fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor, levels: Tensor) -> Tensor:
    """The values of x after storage as codes of the nearest levels; NaN stays NaN.

    Differentiable in levels, in scale (LSQ, Esser et al., ICLR 2020, eq. 3) and, straight through,
    in x, with gradient 1 between the outermost levels and 0 beyond them.

    Args:
        x: real floating, any shape.
        scale, zero_point: broadcastable to x.
        levels: (L,), ascending.
    """
    return _NearestLevel.apply(x, scale, zero_point, levels)


def beyond(places: Tensor, levels: Tensor) -> Tensor:
    """Where places lie more than half a step outside the outermost levels, bool."""
    low, high = levels[0] - (levels[1] - levels[0]) / 2, levels[-1] + (levels[-1] - levels[-2]) / 2
    return (places < low) | (places > high)
