"""The quantizer of complex activations: one real quantizer for each part."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bkcore.errors import DTypeError, InputError, ShapeError
from bkcore.quantization.quantizers import GroupWiseQuantizer
from bkcore.quantization.transaction import all_or_nothing


class ComplexQuantizer(nn.Module):
    """Separate quantizers for the real and the imaginary part of (..., num_channels) tensors.

    Args:
        num_channels: size of the last axis.
        per_channel: one scale per group of `group_size` channels; False means one per tensor.
        bits: 4 or 8.
        group_size: channels that share a scale.
        symmetric: None makes the real part symmetric and the imaginary part asymmetric, which suits
            a resolvent because Im G >= 0; True or False forces both.
        shared_zero_point: one zero point for all groups of the imaginary part.
        learnable, norm, observer, percentile, nonuniform: as in `GroupWiseQuantizer`.

    Attributes:
        real, imag: the two `GroupWiseQuantizer`s.
    """

    def __init__(
        self,
        num_channels: int,
        per_channel: bool = True,
        bits: int = 8,
        *,
        group_size: int = 1,
        symmetric: bool | None = None,
        learnable: bool = False,
        norm: int = 1,
        observer: str | None = None,
        percentile: float = 99.9,
        nonuniform: bool = False,
        shared_zero_point: bool = False,
    ) -> None:
        super().__init__()
        for name, flag in (("per_channel", per_channel), ("shared_zero_point", shared_zero_point)):
            if not isinstance(flag, bool):
                raise InputError(f"{name} must be True or False, not {flag!r}")
        size = group_size if per_channel else num_channels

        def part(default_symmetric: bool, shares: bool = False) -> GroupWiseQuantizer:
            return GroupWiseQuantizer(
                num_channels,
                size,
                bits,
                symmetric=default_symmetric if symmetric is None else symmetric,
                learnable=learnable,
                norm=norm,
                observer=observer,
                percentile=percentile,
                nonuniform=nonuniform,
                shared_zero_point=shares,
            )

        self.real = part(default_symmetric=True)
        self.imag = part(default_symmetric=False, shares=shared_zero_point)

    @property
    def num_channels(self) -> int:
        """Size of the last axis."""
        return self.real.num_channels

    @property
    def num_groups(self) -> int:
        """Groups of each part."""
        return self.real.num_groups

    @property
    def bits(self) -> int:
        """Bits of each part's codes."""
        return self.real.bits

    @property
    def scales(self) -> Tensor:
        """(2, num_groups) float32: scales of the real part, then of the imaginary part."""
        return torch.stack((self.real.scales, self.imag.scales))

    @property
    def calibrated(self) -> bool:
        """True once both parts are calibrated."""
        return self.real.calibrated and self.imag.calibrated

    @property
    def storage_bytes(self) -> int:
        """Bytes of the quantization parameters of both parts."""
        return self.real.storage_bytes + self.imag.storage_bytes

    def start_calibration(self) -> None:
        """Discard earlier observations."""
        self.real.start_calibration()
        self.imag.start_calibration()

    def observe(self, x: Tensor) -> None:
        """Add complex x (..., num_channels) to the calibration data; raises as `calibrate`."""
        _check_complex(x)
        with all_or_nothing(self):
            self.real.observe(x.real)
            self.imag.observe(x.imag)

    def end_calibration(self) -> None:
        """Choose the scales of both parts; `CalibrationError` if nothing was observed."""
        with all_or_nothing(self):
            self.real.end_calibration()
            self.imag.end_calibration()

    def calibrate(self, x: Tensor) -> None:
        """Choose the scales from one complex tensor (..., num_channels).

        Raises:
            DTypeError: if x is not complex.
            CalibrationError: if it is empty or not finite.
        """
        with all_or_nothing(self):
            self.start_calibration()
            self.observe(x)
            self.end_calibration()

    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """int8 codes of the real and imaginary parts of complex x."""
        _check_complex(x)
        return self.real.quantize(x.real), self.imag.quantize(x.imag)

    def dequantize(self, real: Tensor, imag: Tensor) -> Tensor:
        """complex64 values of two int8 code tensors of equal shape.

        Raises:
            DTypeError, ShapeError, InputError: if they are not valid codes.
            LifecycleError: before calibration.
        """
        parts = self.real.dequantize_named("real", real), self.imag.dequantize_named("imag", imag)
        if real.shape != imag.shape:
            raise ShapeError(
                f"real and imag must have the same shape, not {tuple(real.shape)} and "
                f"{tuple(imag.shape)}"
            )
        return torch.complex(*parts)

    def fake_quantize(self, x: Tensor) -> Tensor:
        """`dequantize(*quantize(x))` with a straight-through gradient."""
        _check_complex(x)
        return torch.complex(self.real.fake_quantize(x.real), self.imag.fake_quantize(x.imag))

    def freeze(self) -> None:
        """Turn learned scales into stored ones with the same values."""
        self.real.freeze()
        self.imag.freeze()

    def thaw(self) -> None:
        """Turn stored scales into learned ones with the same values."""
        self.real.thaw()
        self.imag.thaw()


def _check_complex(x: Tensor) -> None:
    if not isinstance(x, Tensor) or not x.is_complex():
        given = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise DTypeError(
            f"x must hold complex values, not {given}; use GroupWiseQuantizer for real ones"
        )
