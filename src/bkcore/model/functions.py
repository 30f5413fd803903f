"""Float functions of the model: PyTorch's own for gradients, else those whose bits are fixed."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bkcore import kernels
from bkcore.kernels import in_order


class RMSNorm(nn.RMSNorm):
    """Root mean square norm over the last axis."""

    def forward(self, x: Tensor) -> Tensor:
        """x (..., D) -> (..., D)."""
        if in_order(x) and self.weight.dtype == torch.float32:
            assert self.eps is not None
            return kernels.rms_norm(x, self.weight, self.eps)
        return super().forward(x)


def silu(x: Tensor) -> Tensor:
    """SiLU of x, of any shape."""
    return kernels.silu(x) if in_order(x) else F.silu(x)


def unit_length(x: Tensor, eps: float) -> Tensor:
    """x / sqrt(sum(x^2) + eps) for x (..., K), summed over the last axis."""
    if in_order(x):
        return kernels.unit_length(x, eps)
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + eps)


class ShortConvolution(nn.Conv1d):
    """A causal convolution with separate taps for every channel, and SiLU."""

    def __init__(self, channels: int, taps: int) -> None:
        super().__init__(channels, channels, taps, groups=channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, N + taps - 1, C), which begins before the first site -> (B, N, C)."""
        if in_order(x) and self.weight.dtype == torch.float32:
            return kernels.short_convolution(x, self.weight[:, 0].t())
        return F.silu(super().forward(x.transpose(1, 2)).transpose(1, 2))


class Router(nn.Linear):
    """The experts' scores, without a bias."""

    def __init__(self, inputs: int, experts: int) -> None:
        super().__init__(inputs, experts, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., D) -> (..., E)."""
        if in_order(x) and self.weight.dtype == torch.float32:
            return kernels.dense_product(x, self.weight)
        return super().forward(x)


def exponential(x: Tensor) -> Tensor:
    """exp(x), rounded from float64, in which all implementations agree."""
    return x.double().exp().to(x.dtype)


def softmax(x: Tensor) -> Tensor:
    """Softmax over the last axis of x (..., K), in at least float32."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return kernels.softmax(x) if in_order(x) else x.softmax(-1)


def in_turn(terms: Tensor) -> Tensor:
    """The sum of terms (..., K) over the last axis, from first to last: (..., 1)."""
    total = terms[..., :1]
    for k in range(1, terms.shape[-1]):
        total = total + terms[..., k : k + 1]
    return total
