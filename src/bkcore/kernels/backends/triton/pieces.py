"""Parts of the sweep's Triton kernels: complex arithmetic, a program's place, loads and stores."""

from __future__ import annotations

import triton
import triton.language as tl

RESCALED = tl.constexpr(16)
"""Sites between two scalings of a block's matrix: 16 factors of 1e18 are below 1e308."""

EXACT = tl.constexpr(12582912.0)
"""1.5 * 2^23: float32 numbers of this size are integers, so adding and subtracting it rounds to
integers, ties to even. This works for numbers up to 2^22, larger than any code."""


@triton.jit
def program_place(blocks, lanes, BLOCK: tl.constexpr):
    """Block, tile of lanes and batch element of a program. Tiles come first, since they are
    neighbours in memory. Lanes and batch elements may be far apart, so their offsets are int64."""
    program = tl.program_id(0)
    tiles = tl.cdiv(lanes, BLOCK)
    rest = program // tiles
    return rest % blocks, (program % tiles).to(tl.int64), (rest // blocks).to(tl.int64)


@triton.jit
def multiply(a_re, a_im, b_re, b_im):
    return tl.fma(a_re, b_re, -(a_im * b_im)), tl.fma(a_re, b_im, a_im * b_re)


@triton.jit
def reciprocal(a_re, a_im):
    scale = 1.0 / tl.fma(a_re, a_re, a_im * a_im)
    return a_re * scale, -a_im * scale


@triton.jit
def load(ptr, offset, mask):
    return tl.load(ptr + offset, mask=mask, other=0.0).to(tl.float64)


@triton.jit
def store(ptr, offset, mask, x):
    tl.store(ptr + offset, x.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def store_pair(ptr, offset, step, mask, re, im):
    store(ptr, offset, mask, re)
    store(ptr, offset + step, mask, im)


@triton.jit
def load_pair(ptr, offset, step, mask):
    return load(ptr, offset, mask), load(ptr, offset + step, mask)


@triton.jit
def read(
    ptr, row, step, lane, mask, scale, zero, levels, q_row,
    BITS: tl.constexpr, LEVELS: tl.constexpr,
):  # fmt: skip
    """Numbers of one site, decoded in float32 if they are codes."""
    if BITS == 0:
        return load(ptr, row + lane * step, mask)
    if BITS == 8:
        code = tl.load(ptr + row + lane * step, mask=mask, other=0).to(tl.int32)
    else:
        byte = tl.load(ptr + row + (lane // 2) * step, mask=mask, other=0).to(tl.int32)
        code = (((byte >> (4 * (lane % 2))) & 15) ^ 8) - 8
    level = code.to(tl.float32)
    if LEVELS:
        level = tl.load(levels + code + (1 << (BITS - 1)))
    s = tl.load(scale + q_row + lane, mask=mask, other=1.0)
    z = tl.load(zero + q_row + lane, mask=mask, other=0.0)
    return (s * (level - z)).to(tl.float64)


@triton.jit
def encode(x, s, z, bounds, BITS: tl.constexpr, LEVELS: tl.constexpr):
    """Codes (int32) of float64 numbers, which are first rounded to float32."""
    half: tl.constexpr = 1 << (BITS - 1)
    ratio = tl.div_rn(x.to(tl.float32), s)
    if LEVELS:
        ratio = ratio + z
        place = tl.zeros(ratio.shape, tl.int32)
        for power in tl.static_range(BITS):
            ahead = 1 << (BITS - 1 - power)
            above = tl.load(bounds + place + (ahead - 1)) < ratio
            place = tl.where(above, place + ahead, place)
        return place - half
    ratio = tl.where(ratio > 4e6, 4e6, tl.where(ratio < -4e6, -4e6, ratio))
    code = (ratio + EXACT) - EXACT + z
    code = tl.where(code > half - 1.0, half - 1.0, code)
    code = tl.where(code >= -half, code, -half)  # NaN, too
    return code.to(tl.int32)


@triton.jit
def write_codes(ptr, row, lanes, tile, mask, code, BITS: tl.constexpr, BLOCK: tl.constexpr):
    if BITS == 8:
        tl.store(ptr + row + tile * BLOCK + tl.arange(0, BLOCK), code.to(tl.int8), mask=mask)
    else:
        nibbles = tl.reshape(tl.where(mask, code & 15, 0), [BLOCK // 2, 2])
        byte = tl.sum(nibbles << (4 * tl.arange(0, 2))[None, :], axis=1)
        pair = tile * (BLOCK // 2) + tl.arange(0, BLOCK // 2)
        tl.store(ptr + row + pair, byte.to(tl.uint8), mask=pair < (lanes + 1) // 2)


@triton.jit
def emit(
    out, row, part, re, im, tile, lane, lanes, mask, p_part, p_lane,
    scale, zero, bounds, q_row, q_part,
    BITS: tl.constexpr, LEVELS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Store a complex number of one site as parts `part` and `part + 1`, as numbers or codes."""
    if BITS == 0:
        store_pair(out, row + part * p_part + lane * p_lane, p_part, mask, re, im)
    else:
        first = q_row + part * q_part + lane
        for half in tl.static_range(2):
            s = tl.load(scale + first + half * q_part, mask=mask, other=1.0)
            z = tl.load(zero + first + half * q_part, mask=mask, other=0.0)
            x = re if half == 0 else im
            table = bounds + (part + half) * (1 << BITS)
            code = encode(x, s, z, table, BITS, LEVELS)
            write_codes(
                out, row + (part + half) * p_part, lanes, tile, mask, code, BITS, BLOCK
            )  # fmt: skip


@triton.jit
def put(
    ptr, row: tl.constexpr, column: tl.constexpr, DIM: tl.constexpr, lanes, lane, mask, re, im
):  # fmt: skip
    store_pair(ptr, ((row * DIM + column) * 2) * lanes + lane, lanes, mask, re, im)
