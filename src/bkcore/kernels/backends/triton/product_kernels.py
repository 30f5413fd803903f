"""Triton kernel for products with a quantized weight, with the roundings of `bkcore::product`."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def product(
    codes, row_scale, weight, levels, scales, out,
    rows, inputs, outputs, groups, group_size, width,
    BITS: tl.constexpr, ROWS: tl.constexpr, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr,
):  # fmt: skip
    """out (M, O) of codes (M, K) and weight (O, K), or (O, ceil(K / 2)) with two codes per byte.

    The 4-bit codes, -8 to 7, stand for `levels`.
    """
    tiles = tl.cdiv(outputs, OUTPUTS)
    row = (tl.program_id(0) // tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    # A weight may have more than 2^31 codes.
    column = (tl.program_id(0) % tiles).to(tl.int64) * OUTPUTS + tl.arange(0, OUTPUTS)
    total = tl.zeros([ROWS, OUTPUTS], tl.float32)
    for group in range(0, groups):
        first = group * group_size
        stop = tl.minimum(first + group_size, inputs)
        sums = tl.zeros([ROWS, OUTPUTS], tl.int32)
        for k in range(first, stop, INPUTS):
            at = k + tl.arange(0, INPUTS)
            x = tl.load(
                codes + row[:, None] * inputs + at[None, :],
                mask=(row[:, None] < rows) & (at[None, :] < stop),
                other=0,
            )
            kept = (column[:, None] < outputs) & (at[None, :] < stop)
            if BITS == 8:
                w = tl.load(weight + column[:, None] * width + at[None, :], mask=kept, other=0)
            else:
                place = weight + column[:, None] * width + at[None, :] // 2
                byte = tl.load(place, mask=kept, other=0).to(tl.int32)
                code = ((byte >> (4 * (at[None, :] % 2))) & 15) ^ 8
                w = tl.where(kept, tl.load(levels + code), 0).to(tl.int8)
            sums = tl.dot(x, tl.trans(w), sums, out_dtype=tl.int32)
        scale = tl.load(scales + column * groups + group, mask=column < outputs, other=0.0)
        total = total + sums.to(tl.float32) * scale.to(tl.float32)[None, :]
    by = tl.load(row_scale + row, mask=row < rows, other=0.0)
    kept = (row[:, None] < rows) & (column[None, :] < outputs)
    tl.store(out + row[:, None] * outputs + column[None, :], total * by[:, None], mask=kept)
