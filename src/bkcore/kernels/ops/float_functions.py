"""Float functions of a language model that give the same bits everywhere in inference.

PyTorch's own functions may round differently for another number of rows or threads, at the end of a
vector, or in the next release, so that a stream would differ from a whole text. These have one
definition, which all instruction sets and the engine share. They have no derivative.

All numbers are float32, and every sum, difference, product, quotient and root is rounded by itself,
as IEEE 754 asks, without fused multiply-add:

    sum_k a_k        sixteen partial sums, the j-th of a_j, a_(j+16), ... from first to last;
                     then halves are added until one number is left
    exp(x)           2^n p(r), x = n ln 2 + r, with a polynomial of degree 6: at most two units in
                     the last place from the truth. x is limited to [-87.33654, 88.37626]
    silu(x)          x / (1 + exp(-x))
    rms_norm         x (1 / sqrt(sum_k x_k^2 / K + eps)) weight
    unit_length      x (1 / sqrt(sum_k x_k^2 + eps))
    short_convolution    silu(sum_t x_(i+t) weight_t), taps from first to last
    dense_product    sum_k x_mk weight_ok
    softmax          exp(x - max) / total, where the total is added up from first to last

Layout
------
    x        float32 (..., K), contiguous in memory or copied; of the convolution (B, N + T - 1, C)
    weight   float32 (K,), convolution (T, C), dense product (O, K) in float32, float16 or bfloat16
    result   float32 as x; convolution (B, N, C), dense product (..., O)
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

from bkcore.errors import DTypeError, InputError, ShapeError
from bkcore.kernels.backends.interface import (
    DenseProduct,
    RmsNorm,
    ShortConvolution,
    Silu,
    Softmax,
    UnitLength,
)
from bkcore.kernels.checks import check_tensors
from bkcore.kernels.ops.contract import define

_WEIGHTS = (torch.float32, torch.float16, torch.bfloat16)
_LARGEST = torch.finfo(torch.float32).max


def in_order(x: Tensor) -> bool:
    """Whether the functions of this module stand in for PyTorch's: in float32, where no gradient is
    wanted."""
    return x.dtype == torch.float32 and not torch.is_grad_enabled()


def silu(x: Tensor) -> Tensor:
    """SiLU of x, of any shape; see this module's text, as for all functions here.

    Raises:
        DTypeError: unless x is float32.
        BackendError: if a forced backend is not available or cannot take the tensors. So do all
            functions here.
    """
    out: Tensor = torch.ops.bkcore.silu.default(x)
    return out


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x (..., K) over its root mean square, times weight (K,).

    Args:
        x, weight: float32.
        eps: at least 0 and finite in float32; added to the mean square. With 0, zeros become NaN.

    Raises:
        ShapeError, DTypeError, InputError: if the tensors do not fit together, or eps is out of its
            range.
    """
    out: Tensor = torch.ops.bkcore.rms_norm.default(x, weight, eps)
    return out


def unit_length(x: Tensor, eps: float) -> Tensor:
    """x (..., K) over its length.

    Args:
        x: float32.
        eps: at least 0 and finite in float32; added to the sum of squares. With 0, zeros become
            NaN.

    Raises:
        ShapeError, DTypeError: if x has no axis, or is not float32.
        InputError: if eps is out of its range.
    """
    out: Tensor = torch.ops.bkcore.unit_length.default(x, eps)
    return out


def short_convolution(x: Tensor, weight: Tensor) -> Tensor:
    """SiLU of the sum over T taps of x (B, N + T - 1, C) times weight (T, C): (B, N, C).

    Raises:
        ShapeError, DTypeError, InputError: if the tensors do not fit together.
    """
    out: Tensor = torch.ops.bkcore.short_convolution.default(x, weight)
    return out


def dense_product(x: Tensor, weight: Tensor) -> Tensor:
    """x (..., K) times a weight (O, K) in float32, float16 or bfloat16, transposed: (..., O).

    Raises:
        ShapeError, DTypeError, InputError: if the tensors do not fit together.
    """
    out: Tensor = torch.ops.bkcore.dense_product.default(x, weight)
    return out


def softmax(x: Tensor) -> Tensor:
    """Softmax over the last axis of x (..., K).

    Raises:
        ShapeError, DTypeError: if x has no axis, or is not float32.
    """
    out: Tensor = torch.ops.bkcore.softmax.default(x)
    return out


A = TypeVar("A", Silu, UnitLength, Softmax)


def _check_alone(args: A) -> A:
    x = args.x
    if x.ndim == 0 and not isinstance(args, Silu):
        raise ShapeError("x must have at least one axis")
    check_tensors({"x": (x, x.shape, torch.float32)}, x.device)
    if isinstance(args, UnitLength):
        _check_eps(args.eps)
    return args


def _check_norm(args: RmsNorm) -> RmsNorm:
    x, weight = args.x, args.weight
    if x.ndim == 0:
        raise ShapeError("x must have at least one axis")
    expected = {
        "x": (x, x.shape, torch.float32),
        "weight": (weight, x.shape[-1:], torch.float32),
    }
    check_tensors(expected, x.device, lambda: f"for x {tuple(x.shape)}")
    _check_eps(args.eps)
    return args


def _check_eps(eps: float) -> None:
    if not 0 <= eps <= _LARGEST:
        raise InputError(
            f"eps must be at least 0 and finite in float32, not {eps!r}; a small number such as "
            "1e-6 keeps the root from 0"
        )


def _check_convolution(args: ShortConvolution) -> ShortConvolution:
    x, weight = args.x, args.weight
    if x.ndim != 3 or weight.ndim != 2 or not 1 <= weight.shape[0] <= x.shape[1]:
        raise ShapeError(
            "x must be (B, N + T - 1, C) and weight (T, C), N and T at least 1, not "
            f"{tuple(x.shape)} and {tuple(weight.shape)}"
        )
    expected = {
        "x": (x, x.shape, torch.float32),
        "weight": (weight, (len(weight), x.shape[2]), torch.float32),
    }
    check_tensors(expected, x.device, lambda: f"for x {tuple(x.shape)}")
    return args


def _check_product(args: DenseProduct) -> DenseProduct:
    x, weight = args.x, args.weight
    if x.ndim == 0 or weight.ndim != 2:
        raise ShapeError(
            f"x must be (..., K) and weight (O, K), not {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    if weight.dtype not in _WEIGHTS:
        raise DTypeError(f"weight must be float32, float16 or bfloat16, not {weight.dtype}")
    expected = {
        "x": (x, x.shape, torch.float32),
        "weight": (weight, (len(weight), x.shape[-1]), weight.dtype),
    }
    check_tensors(expected, x.device, lambda: f"for x {tuple(x.shape)}")
    return args


def _plain(x: Tensor) -> Tensor:
    return x.resolve_neg().contiguous()


def _ready(args: A) -> A:
    return args._replace(x=_plain(args.x))


def _like_x(args: A | RmsNorm) -> Tensor:
    return torch.empty_like(args.x, memory_format=torch.contiguous_format)


def _convolved(args: ShortConvolution) -> Tensor:
    batch, sites, channels = args.x.shape
    return args.x.new_empty(batch, sites - len(args.weight) + 1, channels)


def _multiplied(args: DenseProduct) -> Tensor:
    return args.x.new_empty(*args.x.shape[:-1], len(args.weight))


define("silu", Silu, _check_alone, lambda backend, args: backend.silu(_ready(args)), _like_x)
define(
    "unit_length",
    UnitLength,
    _check_alone,
    lambda backend, args: backend.unit_length(_ready(args)),
    _like_x,
)
define(
    "softmax", Softmax, _check_alone, lambda backend, args: backend.softmax(_ready(args)), _like_x
)
define(
    "rms_norm",
    RmsNorm,
    _check_norm,
    lambda backend, args: backend.rms_norm(
        args._replace(x=_plain(args.x), weight=_plain(args.weight))
    ),
    _like_x,
)
define(
    "short_convolution",
    ShortConvolution,
    _check_convolution,
    lambda backend, args: backend.short_convolution(ShortConvolution(*map(_plain, args))),
    _convolved,
)
define(
    "dense_product",
    DenseProduct,
    _check_product,
    lambda backend, args: backend.dense_product(DenseProduct(*map(_plain, args))),
    _multiplied,
)
