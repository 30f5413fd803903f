"""Float functions of a language model in plain PyTorch, with every operation rounded by itself."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from bkcore.kernels.backends.interface import (
    DenseProduct,
    RmsNorm,
    ShortConvolution,
    Silu,
    Softmax,
    UnitLength,
)

_LANES = 16
"""Partial sums; a sum of products holds one number for each, so rows are multiplied in blocks."""

_BLOCK = 1 << 24

_LOG2_E, _LN2_HIGH, _LN2_LOW = 1.44269504, 0.693359375, -2.12194440e-4
_POLYNOMIAL = (
    *(1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3),
    *(4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1),
)


def silu(args: Silu) -> Tensor:
    return args.x / (1 + _exponential(-args.x))


def rms_norm(args: RmsNorm) -> Tensor:
    count = args.x.new_tensor(args.x.shape[-1])  # by a number, a GPU divides less exactly
    mean = _sum(args.x.square()) / count
    return args.x * (1 / _root(mean + args.eps)) * args.weight


def unit_length(args: UnitLength) -> Tensor:
    return args.x * (1 / _root(_sum(args.x.square()) + args.eps))


def short_convolution(args: ShortConvolution) -> Tensor:
    sites = args.x.shape[1] - len(args.weight) + 1
    total = args.x[:, :sites] * args.weight[0]
    for tap, weight in enumerate(args.weight[1:], start=1):
        total = total + args.x[:, tap : tap + sites] * weight
    return silu(Silu(total))


def dense_product(args: DenseProduct) -> Tensor:
    weight = args.weight.float()
    rows = args.x.flatten(0, -2) if args.x.ndim > 1 else args.x[None]
    at_once = max(1, _BLOCK // max(1, weight.numel()))
    blocks = [_sum(block[:, None] * weight)[..., 0] for block in rows.split(at_once)]
    return torch.cat(blocks).view(*args.x.shape[:-1], len(weight))


def softmax(args: Softmax) -> Tensor:
    if not args.x.numel():
        return torch.empty_like(args.x)
    powers = _exponential(args.x - args.x.amax(-1, keepdim=True))
    total = powers[..., :1]
    for k in range(1, powers.shape[-1]):
        total = total + powers[..., k : k + 1]
    return powers / total


def _sum(terms: Tensor) -> Tensor:
    """The sum over the last axis, (..., 1)."""
    padded = F.pad(terms, (0, -terms.shape[-1] % _LANES))
    parts = terms.new_zeros(*terms.shape[:-1], _LANES)
    for first in range(0, padded.shape[-1], _LANES):
        parts = parts + padded[..., first : first + _LANES]
    while parts.shape[-1] > 1:
        low, high = parts.chunk(2, -1)
        parts = low + high
    return parts


def _root(x: Tensor) -> Tensor:
    # PyTorch's float32 root (MKL's) is not always rounded correctly; its float64 root, rounded, is.
    return x.double().sqrt().float()


def _exponential(x: Tensor) -> Tensor:
    limited = x.clamp(-87.33654, 88.37626)
    n = (limited * _LOG2_E).round()
    r = limited - n * _LN2_HIGH - n * _LN2_LOW
    p = torch.full_like(r, _POLYNOMIAL[0])
    for coefficient in _POLYNOMIAL[1:]:
        p = p * r + coefficient
    p = p * (r * r) + r + 1
    # NaN has no n; p is NaN then, and so is the result.
    power = ((n.nan_to_num(0).to(torch.int32) + 127) << 23).view(torch.float32)
    return p * power
