"""Float functions of a language model on a CPU, parallel over rows."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bkcore.kernels.backends.cpu import native
from bkcore.kernels.backends.interface import (
    DenseProduct,
    RmsNorm,
    ShortConvolution,
    Silu,
    Softmax,
    UnitLength,
)

_KINDS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
"""Of weights, numbered as `Dense::Kind` in csrc/functions.h."""


def silu(args: Silu) -> Tensor:
    out = torch.empty_like(args.x)
    native.call("silu", args, count=out.numel(), out=native.buffer(out))
    return out


def rms_norm(args: RmsNorm) -> Tensor:
    return _by_rows("rms_norm", args)


def unit_length(args: UnitLength) -> Tensor:
    return _by_rows("unit_length", args)


def softmax(args: Softmax) -> Tensor:
    return _by_rows("softmax", args)


def _by_rows(name: str, args: RmsNorm | UnitLength | Softmax) -> Tensor:
    out = torch.empty_like(args.x)
    channels = out.shape[-1]
    rows = out.numel() // max(channels, 1)
    native.call(name, args, rows=rows, channels=channels, out=native.buffer(out))
    return out


def short_convolution(args: ShortConvolution) -> Tensor:
    batch, given, channels = args.x.shape
    taps = len(args.weight)
    out = args.x.new_empty(batch, given - taps + 1, channels)
    sizes = {"batch": batch, "sites": out.shape[1], "taps": taps, "channels": channels}
    native.call("short_convolution", args, **sizes, out=native.buffer(out))
    return out


def dense_product(args: DenseProduct) -> Tensor:
    outputs, inputs = args.weight.shape
    out = args.x.new_empty(*args.x.shape[:-1], outputs)
    rows = math.prod(args.x.shape[:-1])
    sizes = {"rows": rows, "inputs": inputs, "outputs": outputs, "kind": _KINDS[args.weight.dtype]}
    native.call("dense_product", args, **sizes, out=native.buffer(out))
    return out
