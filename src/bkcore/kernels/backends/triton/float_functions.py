"""Float functions of a language model on a GPU: PyTorch's own, equal up to rounding."""

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


def silu(args: Silu) -> Tensor:
    return F.silu(args.x)


def rms_norm(args: RmsNorm) -> Tensor:
    return F.rms_norm(args.x, args.weight.shape, args.weight, args.eps)


def unit_length(args: UnitLength) -> Tensor:
    x = args.x
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + args.eps)


def short_convolution(args: ShortConvolution) -> Tensor:
    sites = args.x.shape[1] - len(args.weight) + 1
    taps = enumerate(args.weight)
    return F.silu(sum(args.x[:, tap : tap + sites] * weight for tap, weight in taps))


def dense_product(args: DenseProduct) -> Tensor:
    return F.linear(args.x, args.weight.float())


def softmax(args: Softmax) -> Tensor:
    return args.x.softmax(-1)
