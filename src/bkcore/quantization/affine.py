"""The only rounding function, shared by fake quantization, PTQ, QAT and the integer kernels.

A real x becomes the code  q = clamp(round(x / scale) + zero_point, qmin, qmax)  and is decoded as
scale * (q - zero_point); ties round to even. See Jacob et al., "Quantization and training of neural
networks for efficient integer-arithmetic-only inference", CVPR 2018, eqs. 1-2.

Codes are computed as integer-valued floats. These are exact (|q| <= 128), NaN stays NaN instead of
becoming some integer, and converting them to int8 changes no value.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

SCALE_DTYPE = torch.bfloat16
"""The dtype of stored scales: two bytes with float32's range, so |v| = 1e6 or eta = 1e6 still fit.

At 4 bits, float16 would overflow at |v| = 5e5. The coarser mantissa causes no error, because codes
are computed with the stored scale; it only shifts the range by at most 0.4 %.
"""


def code_range(bits: int) -> tuple[int, int]:
    """Smallest and largest signed code: (-128, 127) at 8 bits, (-8, 7) at 4."""
    return -(1 << (bits - 1)), (1 << (bits - 1)) - 1


_LARGEST_LOG_SCALE = 80.0
"""e^80 = 5.5e34: above any scale from calibration, with gradients that still fit in float32."""


class _RoundedRatio(torch.autograd.Function):
    """round(x / scale), to nearest even; the gradient is that of x / scale (Bengio 2013)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor) -> Tensor:
        ratio = x / scale
        ctx.save_for_backward(ratio, scale)
        ctx.shape = x.shape
        return ratio.round()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        ratio, scale = ctx.saved_tensors
        grad = grads[0] / scale
        # Where x saturates, grad is 0 and the ratio may be infinite; elsewhere |ratio| < 256.
        by_scale = -grad * ratio.clamp(-256, 256)
        return grad.sum_to_size(ctx.shape), by_scale.sum_to_size(scale.shape)


class _StraightThroughCast(torch.autograd.Function):
    """Round float32 to the values that `SCALE_DTYPE` holds; the gradient passes unchanged."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.to(SCALE_DTYPE).to(torch.float32)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


def rounded(x: Tensor) -> Tensor:
    """Round to values that can be stored exactly, as float32; the gradient passes unchanged."""
    return _StraightThroughCast.apply(x)


def storable(scale: Tensor) -> Tensor:
    """Round positive float scales to values that can be stored exactly; float32, differentiable.

    A scale that would round to zero becomes the smallest normal number, since zero would give NaN.
    """
    return rounded(scale).clamp(min=torch.finfo(SCALE_DTYPE).tiny)


def scale_from_log(log_scale: Tensor) -> Tensor:
    """Storable scales exp(log_scale), positive and finite whatever an optimizer did."""
    return storable(log_scale.clamp(max=_LARGEST_LOG_SCALE).exp())


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor | int, bits: int) -> Tensor:
    """Codes of x as integer-valued floats; out-of-range values saturate, NaN stays NaN.

    Args:
        x: real floating tensor, any shape.
        scale: positive float32, broadcastable to x.
        zero_point: integers (any dtype), broadcastable to x; 0 for a symmetric scheme.
        bits: 4 or 8.

    The gradient is straight through inside the range and zero where x saturates.
    """
    qmin, qmax = code_range(bits)
    return torch.clamp(_RoundedRatio.apply(x, scale) + zero_point, qmin, qmax)


def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor | int) -> Tensor:
    """Real values of the codes, float32: scale * (codes - zero_point)."""
    return scale * (codes - zero_point)


def fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor | int, bits: int) -> Tensor:
    """`dequantize(quantize(x))`: the values of x after storage, in its shape and with a gradient.

    Differentiable in x (straight through, zero where it saturates) and in scale. The gradient with
    respect to the scale is that of learned step sizes (LSQ, Esser et al., ICLR 2020, eq. 3).
    """
    return dequantize(quantize(x, scale, zero_point, bits), scale, zero_point)
