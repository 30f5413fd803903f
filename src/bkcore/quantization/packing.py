"""INT4 storage: two codes a byte."""

from __future__ import annotations

import torch
from torch import Tensor

from bkcore.errors import DTypeError, ShapeError


def pack_int4(codes: Tensor) -> Tensor:
    """Pack int8 codes in [-8, 7] along the last axis: (..., K) -> uint8 (..., ceil(K / 2)).

    Even positions take the low nibble; an odd K leaves the last high nibble zero.

    Raises:
        DTypeError: if the codes are not int8.
        ShapeError: if the codes have no axis.
    """
    if codes.dtype != torch.int8:
        raise DTypeError(f"pack_int4 takes int8 codes, not {codes.dtype}")
    if codes.dim() == 0:
        raise ShapeError("pack_int4 takes at least one axis")
    if codes.shape[-1] % 2:
        codes = torch.nn.functional.pad(codes, (0, 1))
    nibbles = codes.view(torch.uint8) & 0xF
    return nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)


def unpack_int4(packed: Tensor, length: int) -> Tensor:
    """Inverse of `pack_int4`: uint8 (..., ceil(length / 2)) -> int8 (..., length) in [-8, 7].

    Raises:
        DTypeError: if `packed` is not uint8.
        ShapeError: if its last axis does not hold `length` codes.
    """
    if packed.dtype != torch.uint8:
        raise DTypeError(f"unpack_int4 takes uint8 bytes, not {packed.dtype}")
    if packed.shape[-1] != (length + 1) // 2:
        raise ShapeError(
            f"{length} codes of 4 bits take {(length + 1) // 2} bytes, not {packed.shape[-1]}"
        )
    signed = packed.view(torch.int8)
    # Arithmetic shifts extend the sign: the low nibble is first moved to the top of the byte.
    both = torch.stack(((signed << 4) >> 4, signed >> 4), dim=-1)
    return both.flatten(-2)[..., :length]
