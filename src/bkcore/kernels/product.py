"""Products with a weight in codes: the operator `bkcore::product`.

Rows of activations are rounded to INT8, each with a scale of its own, and multiplied with the rows
of a weight of 8 or 4 bits, which stays packed in memory. It has no derivative.

The order of roundings, the same in every backend and on every machine:

    scale_m = max_k |x_mk| / 127, but 1 if that is below the smallest normal number
    q_mk    = round(x_mk / scale_m)                             ties to even
    sum_mog = sum of q_mk w_ok over the inputs k of group g     exact, int32
    y_mo    = (float32(sum_mo0) s_o0 + float32(sum_mo1) s_o1 + ...) scale_m

with groups added from the first to the last, each term rounded before it is added. So a row does
not depend on what other rows there are. A row with NaN or infinity gives NaN throughout.

Layout
------
    x       float32 (..., K): M rows; contiguous in memory or copied
    weight  8 bits: int8 (O, K);  4 bits: uint8 (O, ceil(K / 2)), the even input low
            at 4 bits a code stands for w = level(code), see `bkcore.kernels.weight_levels`
    scales  bfloat16 (O, G), s, of groups of `group_size` inputs; G = ceil(K / group_size)
    result  float32 (..., O)
"""

from __future__ import annotations

import torch
from torch import Tensor

from bkcore.errors import DTypeError, InputError, ShapeError
from bkcore.kernels.selection import select

_LARGEST_GROUP = (2**31 - 1) // (128 * 127)
"""Products of codes that an int32 holds the sum of, whatever they are."""

_library = torch.library.Library("bkcore", "FRAGMENT")
_library.define(
    "product(Tensor x, Tensor weight, Tensor scales, int group_size, int bits) -> Tensor"
)


def product(x: Tensor, weight: Tensor, scales: Tensor, group_size: int, bits: int) -> Tensor:
    """Multiply rows with the rows of a weight in codes; layout and roundings as in this module.

    Returns:
        float32 (..., O).

    Raises:
        ShapeError, DTypeError, InputError: the tensors do not fit together, bits is not 4 or 8, or
            a group has more than 132,104 inputs.
        BackendError: a forced backend is absent or cannot take the tensors.
    """
    out: Tensor = torch.ops.bkcore.product.default(x, weight, scales, group_size, bits)
    return out


def _check(x: Tensor, weight: Tensor, scales: Tensor, group_size: int, bits: int) -> None:
    if bits not in (4, 8):
        raise InputError(f"bits must be 4 or 8, not {bits}")
    inputs = x.shape[-1] if x.ndim else 0
    if inputs < 1 or group_size < 1:
        raise InputError(f"x {tuple(x.shape)} and group_size={group_size} must be at least 1 wide")
    if min(group_size, inputs) > _LARGEST_GROUP:
        raise InputError(f"{inputs} inputs in one group may overflow int32; make groups smaller")
    outputs = weight.shape[0] if weight.ndim else 0
    width = inputs if bits == 8 else -(-inputs // 2)
    wanted = (
        ("x", x, torch.float32, x.shape),
        ("weight", weight, torch.int8 if bits == 8 else torch.uint8, (outputs, width)),
        ("scales", scales, torch.bfloat16, (outputs, -(-inputs // group_size))),
    )
    for name, tensor, dtype, shape in wanted:
        if tensor.dtype != dtype:
            raise DTypeError(f"{name} must be {dtype} at {bits} bits, got {tensor.dtype}")
        if tensor.shape != shape:
            raise ShapeError(
                f"{name} must be {tuple(shape)} for {inputs} inputs of {bits} bits in groups of "
                f"{group_size}, got {tuple(tensor.shape)}"
            )
        if tensor.device != x.device:
            raise InputError(f"{name} is on {tensor.device} but x is on {x.device}; move one")


def _product(x: Tensor, weight: Tensor, scales: Tensor, group_size: int, bits: int) -> Tensor:
    _check(x, weight, scales, group_size, bits)
    group_size = min(group_size, x.shape[-1])
    backend = select(x)
    return backend.product(
        x.contiguous(), weight.contiguous(), scales.contiguous(), group_size, bits
    )


def _product_fake(x: Tensor, weight: Tensor, scales: Tensor, group_size: int, bits: int) -> Tensor:
    _check(x, weight, scales, group_size, bits)
    return x.new_empty(*x.shape[:-1], weight.shape[0])


_library.impl("product", _product, "CompositeExplicitAutograd")
torch.library.register_fake("bkcore::product", _product_fake, lib=_library)
