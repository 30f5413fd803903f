"""INT4 codes, two a byte."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bkcore.errors import DTypeError, ShapeError
from bkcore.quantization import pack_int4, unpack_int4


@given(st.lists(st.integers(-8, 7), max_size=17), st.integers(1, 3))
def test_round_trip_of_any_length(codes, rows):
    tensor = torch.tensor(codes, dtype=torch.int8).expand(rows, len(codes))
    packed = pack_int4(tensor)
    assert packed.dtype == torch.uint8
    assert packed.shape == (rows, (len(codes) + 1) // 2)
    unpacked = unpack_int4(packed, len(codes))
    assert unpacked.dtype == torch.int8
    assert torch.equal(unpacked, tensor)


def test_round_trip_of_every_byte():
    every = torch.arange(256, dtype=torch.int64).to(torch.uint8)
    assert torch.equal(pack_int4(unpack_int4(every, 512)), every)


def test_the_even_position_takes_the_low_nibble():
    codes = torch.tensor([1, -1, 7], dtype=torch.int8)
    assert pack_int4(codes).tolist() == [0xF1, 0x07]


def test_a_view_that_is_not_contiguous():
    codes = torch.arange(-8, 8, dtype=torch.int8).view(4, 4)
    for view in (codes.t(), codes[:, 1:], codes[:, ::2], codes[..., :3]):
        assert torch.equal(unpack_int4(pack_int4(view), view.shape[-1]), view)


def test_packing_leaves_its_input_alone():
    codes = torch.tensor([-8, 7, 0], dtype=torch.int8)
    pack_int4(codes)
    assert codes.tolist() == [-8, 7, 0]


def test_errors():
    with pytest.raises(DTypeError, match=r"int8 codes, not torch\.int32"):
        pack_int4(torch.zeros(4, dtype=torch.int32))
    with pytest.raises(ShapeError, match="at least one axis"):
        pack_int4(torch.tensor(1, dtype=torch.int8))
    with pytest.raises(DTypeError, match=r"uint8 bytes, not torch\.int8"):
        unpack_int4(torch.zeros(4, dtype=torch.int8), 8)
    for length in (6, 9):
        with pytest.raises(ShapeError, match=f"{length} codes of 4 bits take"):
            unpack_int4(torch.zeros(4, dtype=torch.uint8), length)
