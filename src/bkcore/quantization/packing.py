"""INT4 storage: two codes per byte."""

from __future__ import annotations

import torch
from torch import Tensor

from bkcore.errors import DTypeError, InputError, ShapeError


def pack_int4(codes: Tensor) -> Tensor:
    """Pack int8 codes in [-8, 7] along the last axis: (..., K) -> uint8 (..., ceil(K / 2)).

    Even positions take the low nibble; an odd K leaves the last high nibble zero.

    Raises:
        DTypeError: if the codes are not int8.
        InputError: if a code is out of range (checked only on the CPU).
        ShapeError: if the codes have no axis.
    """
    _require_dtype("codes", codes, torch.int8, "int8 codes")
    if codes.dim() == 0:
        raise ShapeError("codes must have at least one axis")
    if codes.is_cpu and codes.numel():
        low, high = (int(end) for end in torch.aminmax(codes))
        if low < -8 or high > 7:
            raise InputError(f"4-bit codes must be in [-8, 7], but these are in [{low}, {high}]")
    if codes.shape[-1] % 2:
        codes = torch.nn.functional.pad(codes, (0, 1))
    nibbles = codes.view(torch.uint8) & 0xF
    return nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)


def unpack_int4(packed: Tensor, length: int) -> Tensor:
    """Inverse of `pack_int4`: uint8 (..., ceil(length / 2)) -> int8 (..., length) in [-8, 7].

    Raises:
        DTypeError: if `packed` is not uint8.
        InputError: if `length` is not a non-negative integer.
        ShapeError: if its last axis does not hold `length` codes.
    """
    _require_dtype("packed", packed, torch.uint8, "uint8 bytes")
    if isinstance(length, bool) or not isinstance(length, int) or length < 0:
        raise InputError(f"length must be a non-negative integer, not {length!r}")
    if packed.dim() == 0 or packed.shape[-1] != (length + 1) // 2:
        raise ShapeError(
            f"packed has shape {tuple(packed.shape)}, but {length} codes of 4 bits take "
            f"{(length + 1) // 2} bytes in the last axis"
        )
    signed = packed.view(torch.int8)
    # Arithmetic right shifts extend the sign, so the low nibble is first moved to the top.
    both = torch.stack(((signed << 4) >> 4, signed >> 4), dim=-1)
    return both.flatten(-2)[..., :length]


def _require_dtype(name: str, value: Tensor, dtype: torch.dtype, kind: str) -> None:
    if not isinstance(value, Tensor) or value.dtype != dtype:
        given = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise DTypeError(f"{name} must be a tensor of {kind}, not {given}")
