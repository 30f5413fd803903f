"""The quantizer of real activations; `complex_quantizer` pairs two of them for complex ones."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn

from bkcore.errors import CalibrationError, DTypeError, InputError, LifecycleError, ShapeError
from bkcore.kernels import round_channels, round_channels_straight_through
from bkcore.kernels.checks import check_bits, count_groups, fit_group_size
from bkcore.quantization import affine, levels
from bkcore.quantization.config import check_observer
from bkcore.quantization.levels import LevelTable
from bkcore.quantization.observers import METHODS, HistogramObserver
from bkcore.quantization.storage import StoredDtypes
from bkcore.quantization.transaction import all_or_nothing

_ROUNDED = 1e-3
"""By how much a computed weight may exceed 1, through rounding."""


class GroupWiseQuantizer(StoredDtypes):
    """Affine quantizer of real (..., num_channels) tensors, with a scale and zero point per group.

    Args:
        num_channels: size of the last axis.
        group_size: neighbouring channels that share a scale; the last group may be smaller.
            1 means one scale per channel, `num_channels` (or more) one per tensor.
        bits: 4 or 8.
        symmetric: True puts the zero point at 0; False fits it to the data.
        learnable: make the scales a parameter that trains with the model (learned step sizes),
            stored as log_scales so that they stay positive.
        norm: 1 or 2. The error that counts is the mean |error|^norm over the calibration data: the
            mean absolute or the mean squared error.
        observer: how the range is chosen, as in `QuantizationConfig`; None minimizes the error
            that counts.
        percentile: percent of the values that the observer "percentile" keeps in range.
        nonuniform: also have a level table, learned if the scales are, else fitted in calibration.
        shared_zero_point: one zero point for all groups, stored in one byte; for non-negative
            values.

    Attributes:
        scales: (num_groups,) float32; NaN before calibration.
        table: the `LevelTable` that the codes index, or None if they are evenly spaced.
        zero_points: (num_groups,) int8.
        record: (3,) int64, the calibration record in the state dict: 1 plus the index of the method
            in `METHODS`, the number of values seen, and of those clipped. Zeros before calibration.
    """

    stored = ("stored_scales",)
    written_in_place = ("log_scales", "stored_scales", "zero_points", "record")

    def __init__(
        self,
        num_channels: int,
        group_size: int = 128,
        bits: int = 4,
        *,
        symmetric: bool = True,
        learnable: bool = False,
        norm: int = 1,
        observer: str | None = None,
        percentile: float = 99.9,
        nonuniform: bool = False,
        shared_zero_point: bool = False,
    ) -> None:
        super().__init__()
        check_observer(observer, percentile)
        if type(num_channels) is not int or not 1 <= num_channels < 2**31:
            raise InputError(
                f"num_channels must be at least 1, an integer below 2^31, not {num_channels!r}"
            )
        check_bits(bits)
        if type(norm) is not int or norm not in (1, 2):
            raise InputError(f"norm must be 1 or 2, not {norm!r}")
        flags = {"symmetric": symmetric, "learnable": learnable, "nonuniform": nonuniform}
        for name, flag in (flags | {"shared_zero_point": shared_zero_point}).items():
            if not isinstance(flag, bool):
                raise InputError(f"{name} must be True or False, not {flag!r}")
        self.num_channels = num_channels
        self.group_size = fit_group_size(group_size, num_channels)
        self.bits = bits
        self.symmetric = symmetric
        self.norm = norm
        self.observer = observer or ("mae" if norm == 1 else "mse")
        self.percentile = percentile
        self.shared_zero_point = shared_zero_point and not symmetric
        self._histograms: HistogramObserver | None = None
        self._calibrated = False
        self.table = LevelTable(bits) if nonuniform else None
        if self.table is not None and not learnable:
            self.table.freeze()
        unknown = torch.full((self.num_groups,), torch.nan)
        self.register_buffer("zero_points", torch.zeros(self.num_groups, dtype=torch.int8))
        self.register_buffer("record", torch.zeros(3, dtype=torch.int64))
        self.zero_points: Tensor
        self.record: Tensor
        self.stored_scales: Tensor
        self.log_scales: Tensor
        if learnable:
            self.log_scales = nn.Parameter(unknown)
        else:
            self.register_buffer("stored_scales", unknown.to(affine.SCALE_DTYPE))

    @property
    def num_groups(self) -> int:
        """Number of groups, including an incomplete last one."""
        return count_groups(self.num_channels, self.group_size)

    @property
    def qmin(self) -> int:
        """Smallest code."""
        return affine.code_range(self.bits)[0]

    @property
    def qmax(self) -> int:
        """Largest code."""
        return affine.code_range(self.bits)[1]

    @property
    def learnable(self) -> bool:
        """True while the scales are a parameter."""
        return "log_scales" in self._parameters

    @property
    def scales(self) -> Tensor:
        """Scales in use, (num_groups,) float32, all storable."""
        if self.learnable:
            return affine.scale_from_log(self.log_scales)
        return self.stored_scales.float()

    @property
    def calibrated(self) -> bool:
        """True once the scales are known, also when they come from a state dict."""
        if not self._calibrated:  # looking at values takes as long as rounding one token
            with torch.no_grad():
                self._calibrated = not bool(self.scales.isnan().any())
        return self._calibrated

    @property
    def method(self) -> str | None:
        """How the range was chosen, one of `METHODS`; None before calibration."""
        index = int(self.record[0])
        return METHODS[index - 1] if index else None

    @property
    def values_seen(self) -> int:
        """How many values calibration saw, over all channels."""
        return int(self.record[1])

    @property
    def clipped_share(self) -> float:
        """Fraction of them more than half a step outside the codes; NaN before calibration."""
        return int(self.record[2]) / self.values_seen if self.values_seen else math.nan

    @property
    def storage_bytes(self) -> int:
        """Bytes of the quantization parameters: scales, zero points unless symmetric, and table."""
        table = self.table.storage_bytes if self.table else 0
        return 2 * self.num_groups + self.distinct_zero_points + table

    @property
    def distinct_zero_points(self) -> int:
        """How many zero points must be stored: none, one, or one per group."""
        if self.symmetric:
            return 0
        return 1 if self.shared_zero_point else self.num_groups

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        scheme = "symmetric" if self.symmetric else "asymmetric"
        scheme += ", nonuniform" if self.table else ""
        return f"{self.num_channels}, group_size={self.group_size}, bits={self.bits}, {scheme}"

    def observe(self, x: Tensor, weight: Tensor | None = None) -> None:
        """Add x (..., num_channels) to the calibration data.

        Args:
            x: real floating, (..., num_channels).
            weight: the cost of an error of each value, in [0, 1], in the shape of x; None means 1.

        Raises:
            CalibrationError: if x is not finite.
            DTypeError: if x or the weight is not real floating.
            InputError: if a weight is not in [0, 1].
            ShapeError: if x has a last axis of another size, or the weights another shape.
        """
        self._check(x)
        if weight is not None:
            self._check(weight, name="weight")
            if weight.shape != x.shape:
                raise ShapeError(
                    f"weight must have the shape of x, {tuple(x.shape)}, not {tuple(weight.shape)}"
                )
            if not bool(((weight >= 0) & (weight <= 1 + _ROUNDED)).all()):
                raise InputError("weight must lie in [0, 1] everywhere")
        histograms = copy.copy(self._histograms) or HistogramObserver(self.num_groups)
        groups = torch.arange(self.num_channels) // self.group_size
        histograms.observe(x, groups, weight)
        self._histograms = histograms

    def start_calibration(self) -> None:
        """Discard earlier observations."""
        self._histograms = None

    def end_calibration(self) -> None:
        """Choose the scales and zero points from what was observed.

        If `torch.distributed` is initialized, the observations of all processes count: each must
        call this, and all get the same result.

        Raises:
            CalibrationError: if nothing was observed.
        """
        with all_or_nothing(self):
            self._choose_scales()

    def _choose_scales(self) -> None:
        observer = copy.copy(self._histograms) or HistogramObserver(self.num_groups)
        observer.merge_processes(self.zero_points.device)
        if observer.empty:
            raise CalibrationError(
                "calibration saw no data; pass at least one non-empty batch before it ends"
            )
        choice = observer.choose(
            self.observer,
            self.bits,
            self.symmetric,
            self.norm,
            self.percentile,
            self.shared_zero_point,
        )
        with torch.no_grad():
            target = self.log_scales if self.learnable else self.stored_scales
            target.copy_(choice.scales.log() if self.learnable else choice.scales)
            self.zero_points.copy_(choice.zero_points)
            method = 1 + METHODS.index(choice.method)
            self.record.copy_(torch.tensor([method, choice.seen, choice.clipped]))
        if self.table is not None:
            self.table.fit(observer, choice.scales, choice.zero_points, self.norm)
        self._histograms = None

    def calibrate(self, x: Tensor) -> None:
        """Choose the scales from one tensor (..., num_channels); a failure changes nothing."""
        with all_or_nothing(self):
            self.start_calibration()
            self.observe(x)
            self.end_calibration()

    def quantize(self, x: Tensor) -> Tensor:
        """int8 codes of x, same shape; 4-bit codes lie in [-8, 7].

        Raises:
            InputError: if x is not finite, since no code stands for NaN or infinity.
            LifecycleError: before calibration.
        """
        self._check(x, calibrated=True)
        if not bool(torch.isfinite(x).all()):
            raise InputError("x holds NaN or infinity, which no integer code stands for")
        scale, zero_point = self._per_channel()
        if self.table is not None:
            index = levels.nearest(x / scale + zero_point, self.table.values)
            return (index + self.qmin).to(torch.int8)
        return affine.quantize(x, scale, zero_point, self.bits).to(torch.int8)

    def dequantize(self, codes: Tensor) -> Tensor:
        """float32 values of int8 codes (..., num_channels).

        Raises:
            LifecycleError: before calibration.
            DTypeError, ShapeError, InputError: if these are not valid codes.
        """
        return self.dequantize_named("codes", codes)

    def dequantize_named(self, name: str, codes: Tensor) -> Tensor:
        """`dequantize`, with `name` as the argument's name in error messages."""
        if not isinstance(codes, Tensor) or codes.dtype != torch.int8:
            given = codes.dtype if isinstance(codes, Tensor) else type(codes).__name__
            raise DTypeError(f"{name} must be a tensor of int8 codes, not {given}")
        # Differences of int8 codes and int8 zero points would wrap around.
        whole, codes = codes.long(), codes.float()
        self._check(codes, calibrated=True, name=name)
        if self.bits == 4 and not bool(((whole >= self.qmin) & (whole <= self.qmax)).all()):
            raise InputError(f"{name} must hold 4-bit codes in [-8, 7], but some are outside")
        if self.table is not None:
            codes = self.table.values[whole - self.qmin]
        return affine.dequantize(codes, *self._per_channel())

    def fake_quantize(self, x: Tensor) -> Tensor:
        """`dequantize(quantize(x))` with a straight-through gradient; NaN stays NaN.

        Raises:
            LifecycleError: before calibration.
        """
        self._check(x, calibrated=True)
        table = None if self.table is None else self.table.values
        if x.dtype == torch.float64:
            if table is not None:
                return levels.fake_quantize(x, *self._per_channel(), table)
            return affine.fake_quantize(x, *self._per_channel(), self.bits)
        differentiable = torch.is_grad_enabled() and x.requires_grad
        if self.learnable or differentiable:
            rounding, scales = round_channels_straight_through, self.scales
        else:
            rounding, scales = round_channels, self.stored_scales
        return rounding(
            x.float(), scales, self.zero_points, self.group_size, self.bits, levels=table
        )

    def clips(self, x: Tensor) -> Tensor:
        """Where x (..., num_channels) lies outside the outermost codes and saturates, bool.

        Raises:
            LifecycleError: before calibration.
        """
        self._check(x, calibrated=True)
        scale, zero_point = self._per_channel()
        if self.table is not None:
            return levels.beyond(x / scale + zero_point, self.table.values)
        codes = (x / scale).round() + zero_point
        return (codes < self.qmin) | (codes > self.qmax)

    def freeze(self) -> None:
        """Turn learned scales and levels into stored ones with the same values."""
        if self.table is not None:
            self.table.freeze()
        if self.learnable:
            scales = self.scales.detach().to(affine.SCALE_DTYPE)
            del self.log_scales
            self.register_buffer("stored_scales", scales)

    def thaw(self) -> None:
        """Turn stored scales and levels into trainable ones with the same values."""
        if self.table is not None:
            self.table.thaw()
        if not self.learnable:
            log_scales = self.scales.log()
            del self.stored_scales
            self.log_scales = nn.Parameter(log_scales)

    def _per_channel(self) -> tuple[Tensor, Tensor]:
        if self.num_groups == 1:
            return self.scales, self.zero_points
        groups = torch.arange(self.num_channels, device=self.zero_points.device)
        groups = groups // self.group_size
        return self.scales[groups], self.zero_points[groups]

    def _check(self, x: Tensor, *, calibrated: bool = False, name: str = "x") -> None:
        if not isinstance(x, Tensor):
            raise DTypeError(f"{name} must be a torch.Tensor, not {type(x).__name__}")
        if x.is_complex():
            raise DTypeError(
                f"{name} has {x.dtype} values, but a real quantizer would lose the imaginary part; "
                "use ComplexQuantizer"
            )
        if not x.is_floating_point():
            raise DTypeError(f"{name} must hold floating-point values, not {x.dtype}")
        if x.dim() == 0 or x.shape[-1] != self.num_channels:
            raise ShapeError(
                f"{name} must be (..., {self.num_channels}) for "
                f"num_channels={self.num_channels}, not {tuple(x.shape)}"
            )
        device = self.zero_points.device
        if x.is_meta or (calibrated and x.device != device):
            raise InputError(
                f"{name} is on {x.device} but the quantizer is on {device}; move one of them"
            )
        if calibrated:
            self.require_scales()

    def require_scales(self) -> None:
        """Raise `LifecycleError` before calibration."""
        # A compiled graph cannot look at values; there, a quantizer without scales returns NaN.
        if not torch.compiler.is_compiling() and not self.calibrated:
            raise LifecycleError("the quantizer has no scales yet; calibrate() it first")

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # A state dict saved after conversion holds stored scales, while this module may still have
        # learned ones. Take the state dict's form, so that a converted model loads into a new one.
        if self.learnable and prefix + "stored_scales" in state_dict:
            self.freeze()
        self._calibrated, self._histograms = False, None
        super()._load_from_state_dict(state_dict, prefix, *args)
