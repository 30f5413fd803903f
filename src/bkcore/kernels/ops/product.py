"""Products with a quantized weight: the operator `bkcore::product`.

Rows of activations are rounded to INT8, each with its own scale, and multiplied with the rows of an
8-bit or 4-bit weight, which stays packed in memory. The operator has no derivative.

The order of roundings is the same in every backend and on every machine:

    scale_m = max_k |x_mk| / 127, but 1 if that is below the smallest normal number
    q_mk    = round(x_mk / scale_m)                             ties to even
    sum_mog = sum of q_mk w_ok over the inputs k of group g     exact, int32
    y_mo    = (float32(sum_mo0) s_o0 + float32(sum_mo1) s_o1 + ...) scale_m

with groups added from first to last, and each term rounded before it is added. So the result of a
row does not depend on the other rows. A row with NaN or infinity gives NaN throughout.

Layout
------
    x       float32 (..., K): M rows; contiguous in memory or copied
    weight  8 bits: int8 (O, K);  4 bits: uint8 (O, ceil(K / 2)), the even input low
            at 4 bits a code stands for w = level(code), see `bkcore.kernels.int4_levels`
    scales  bfloat16 (O, G), s, of groups of `group_size` inputs (above K it means K);
            G = ceil(K / group_size)
    result  float32 (..., O)
"""

from __future__ import annotations

import torch
from torch import Tensor

from bkcore.errors import InputError, ShapeError
from bkcore.kernels.backends.interface import Backend, Product
from bkcore.kernels.checks import check_bits, check_tensors, count_groups, fit_group_size
from bkcore.kernels.ops.contract import define

_LARGEST_GROUP = (2**31 - 1) // (128 * 127)
"""How many products of codes an int32 can sum without overflow."""


def product(x: Tensor, weight: Tensor, scales: Tensor, group_size: int, bits: int) -> Tensor:
    """Multiply rows with the rows of a quantized weight; layout and roundings as in this module.

    Returns:
        float32 (..., O).

    Raises:
        ShapeError, DTypeError, InputError: if the tensors do not fit together, bits is not 4 or 8,
            or a group has more than 132,104 inputs.
        BackendError: if a forced backend is not available or cannot take the tensors.
    """
    out: Tensor = torch.ops.bkcore.product.default(x, weight, scales, group_size, bits)
    return out


def _check(args: Product) -> Product:
    x, weight, bits = args.x, args.weight, args.bits
    check_bits(bits)
    inputs = x.shape[-1] if x.ndim else 0
    if inputs < 1:
        raise ShapeError(f"x {tuple(x.shape)} must be at least 1 wide")
    group_size = fit_group_size(args.group_size, inputs)
    if group_size > _LARGEST_GROUP:
        raise InputError(f"{inputs} inputs in one group may overflow int32; make groups smaller")
    outputs = weight.shape[0] if weight.ndim else 0
    width, codes = (inputs, torch.int8) if bits == 8 else (-(-inputs // 2), torch.uint8)
    groups = count_groups(inputs, group_size)
    check_tensors(
        {
            "x": (x, x.shape, torch.float32),
            "weight": (weight, (outputs, width), codes),
            "scales": (args.scales, (outputs, groups), torch.bfloat16),
        },
        x.device,
        lambda: f"at {bits} bits, for {inputs} inputs in groups of {group_size}",
    )
    return Product(x, weight, args.scales, group_size, bits)


def _run(backend: Backend, args: Product) -> Tensor:
    x, weight, scales, group_size, bits = args
    ready = Product(x.contiguous(), weight.contiguous(), scales.contiguous(), group_size, bits)
    return backend.product(ready)


def _like(args: Product) -> Tensor:
    return args.x.new_empty(*args.x.shape[:-1], args.weight.shape[0])


define("product", Product, _check, _run, _like)
