"""Triton kernels of the sweep, parallel over batch, lanes and blocks of sites.

Imported only where Triton is (see `bkcore.kernels.triton`); formulas and derivatives are those of
`bkcore.kernels.ops`. A chain is cut into blocks of LENGTH sites. A first kernel finds what each
block does to what enters it, two small ones (`compose`, `enter`) find what does enter it, and a
last one sweeps every block from there. Nothing is approximated: there is no warm-up window.

What a block does is linear in homogeneous coordinates. With g = x / w and psi = s / w, one site is

    x' = w,   w' = A_i w - t_{i-1}^2 x,   s' = b_i w + t_{i-1} s

(the continuants of the continued fraction; Jones and Thron, Continued Fractions, section 2.1). A
block is the product of its sites' matrices, whose columns are swept side by side, and scaled by a
common factor every few sites, which changes no quotient. The adjoints are affine in (Q, P), or in
one number from either side, hence linear in (Q, P, 1). The last coordinate of every state is the
one that is divided by; `compose` multiplies such matrices and `enter` applies them.

Where two blocks meet, one's last g has to agree with the g that the next was started from far
below the round-off of the result, and what is known of it may be a forward error, larger than a
backward one by a factor of up to 1/eta. So everything between loading and storing is float64.
Tensors of float64 are swept in one block.
"""

from __future__ import annotations

import triton
import triton.language as tl

_RESCALED = tl.constexpr(16)
"""Sites between two scalings of a block's matrix: 16 factors of 1e18 are below 1e308."""

_EXACT = tl.constexpr(12582912.0)
"""1.5 * 2^23: float32 numbers beside it are integers, so adding and subtracting it rounds to them,
ties to even. For numbers up to 2^22, which is beyond every code."""


@triton.jit
def _place(blocks, lanes, BLOCK: tl.constexpr):
    """Block, tile of lanes and batch element of a program. Tiles, which are neighbours in memory,
    come first. Lanes and batch elements may lie far apart, so that their offsets are int64."""
    program = tl.program_id(0)
    tiles = tl.cdiv(lanes, BLOCK)
    rest = program // tiles
    return rest % blocks, (program % tiles).to(tl.int64), (rest // blocks).to(tl.int64)


@triton.jit
def _multiply(a_re, a_im, b_re, b_im):
    return tl.fma(a_re, b_re, -(a_im * b_im)), tl.fma(a_re, b_im, a_im * b_re)


@triton.jit
def _reciprocal(a_re, a_im):
    scale = 1.0 / tl.fma(a_re, a_re, a_im * a_im)
    return a_re * scale, -a_im * scale


@triton.jit
def _load(ptr, offset, mask):
    return tl.load(ptr + offset, mask=mask, other=0.0).to(tl.float64)


@triton.jit
def _store(ptr, offset, mask, x):
    tl.store(ptr + offset, x.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _store_pair(ptr, offset, step, mask, re, im):
    _store(ptr, offset, mask, re)
    _store(ptr, offset + step, mask, im)


@triton.jit
def _load_pair(ptr, offset, step, mask):
    return _load(ptr, offset, mask), _load(ptr, offset + step, mask)


@triton.jit
def _read(
    ptr, row, step, lane, mask, scale, zero, levels, q_row,
    BITS: tl.constexpr, LEVELS: tl.constexpr,
):  # fmt: skip
    """Numbers of one site, decoded in float32 if they are codes."""
    if BITS == 0:
        return _load(ptr, row + lane * step, mask)
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
def _encode(x, s, z, bounds, BITS: tl.constexpr, LEVELS: tl.constexpr):
    """Codes (int32) of float64 numbers that are rounded to float32 first."""
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
    code = (ratio + _EXACT) - _EXACT + z
    code = tl.where(code > half - 1.0, half - 1.0, code)
    code = tl.where(code >= -half, code, -half)  # NaN, too
    return code.to(tl.int32)


@triton.jit
def _write_codes(ptr, row, lanes, tile, mask, code, BITS: tl.constexpr, BLOCK: tl.constexpr):
    if BITS == 8:
        tl.store(ptr + row + tile * BLOCK + tl.arange(0, BLOCK), code.to(tl.int8), mask=mask)
    else:
        nibbles = tl.reshape(tl.where(mask, code & 15, 0), [BLOCK // 2, 2])
        byte = tl.sum(nibbles << (4 * tl.arange(0, 2))[None, :], axis=1)
        pair = tile * (BLOCK // 2) + tl.arange(0, BLOCK // 2)
        tl.store(ptr + row + pair, byte.to(tl.uint8), mask=pair < (lanes + 1) // 2)


@triton.jit
def _emit(
    out, row, part, re, im, tile, lane, lanes, mask, p_part, p_lane,
    scale, zero, bounds, q_row, q_part,
    BITS: tl.constexpr, LEVELS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Store a complex number of one site as parts `part` and `part + 1`, as numbers or codes."""
    if BITS == 0:
        _store_pair(out, row + part * p_part + lane * p_lane, p_part, mask, re, im)
    else:
        first = q_row + part * q_part + lane
        for half in tl.static_range(2):
            s = tl.load(scale + first + half * q_part, mask=mask, other=1.0)
            z = tl.load(zero + first + half * q_part, mask=mask, other=0.0)
            x = re if half == 0 else im
            table = bounds + (part + half) * (1 << BITS)
            code = _encode(x, s, z, table, BITS, LEVELS)
            _write_codes(
                out, row + (part + half) * p_part, lanes, tile, mask, code, BITS, BLOCK
            )  # fmt: skip


@triton.jit
def _put(
    ptr, row: tl.constexpr, column: tl.constexpr, DIM: tl.constexpr, lanes, lane, mask, re, im
):  # fmt: skip
    _store_pair(ptr, ((row * DIM + column) * 2) * lanes + lane, lanes, mask, re, im)


@triton.jit
def sweep_maps(
    v, source, energy, eta, hopping, left, right,
    in_scale, in_zero, in_levels,
    sites, lanes, blocks, v_batch, v_site, v_lane, s_batch, s_site, s_lane, q_site,
    LENGTH: tl.constexpr, SOURCE: tl.constexpr, TWO_SIDED: tl.constexpr,
    SITE_ETA: tl.constexpr, SITE_HOPPING: tl.constexpr,
    BITS: tl.constexpr, LEVELS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The matrix of every block from the left (B, blocks, DIM, DIM, 2, H), and from the right."""
    block, tile, batch = _place(blocks, lanes, BLOCK)
    lane = tile * BLOCK + tl.arange(0, BLOCK)
    mask = lane < lanes
    first = block * LENGTH
    stop = tl.minimum(first + LENGTH, sites)
    origin = first.to(tl.int64)
    e = _load(energy, lane, mask)
    width = _load(eta, lane, mask)
    hop = _load(hopping, lane, mask)
    zero = tl.zeros([BLOCK], tl.float64)
    one = zero + 1.0
    # Columns of the matrix: what comes of w = 1, of x (with a bond of t^2 = -1, put right at the
    # end) and of s.
    xw_re, xw_im, ww_re, ww_im, sw_re, sw_im = zero, zero, one, zero, zero, zero
    xx_re, xx_im, wx_re, wx_im, sx_re, sx_im = one, zero, zero, zero, zero, zero
    ss = one
    for chunk in range(first, stop, _RESCALED):
        for i in range(chunk, tl.minimum(chunk + _RESCALED, stop)):
            far = origin + (i - first)
            if SITE_ETA:
                width = _load(eta, far * lanes + lane, mask)
            if SITE_HOPPING:
                hop = _load(hopping, (far - 1) * lanes + lane, mask & (i > 0))
            t = tl.where(i > 0, hop, 0.0)
            square = tl.where(i > first, t * t, -1.0)
            a_re = _read(
                v, batch * v_batch + far * v_site, v_lane, lane, mask, in_scale, in_zero,
                in_levels, far * q_site, BITS, LEVELS,
            ) - e  # fmt: skip
            a_im = tl.where(mask, -width, -1.0)
            if SOURCE:
                q_part = tl.maximum(q_site * sites, lanes)
                b = _read(
                    source, batch * s_batch + far * s_site, s_lane, lane, mask,
                    in_scale + q_part, in_zero + q_part, in_levels + (1 << BITS),
                    far * q_site, BITS, LEVELS,
                )  # fmt: skip
                sw_re, sw_im = b * ww_re + t * sw_re, b * ww_im + t * sw_im
                sx_re, sx_im = b * wx_re + t * sx_re, b * wx_im + t * sx_im
                ss = t * ss
            next_re, next_im = _multiply(a_re, a_im, ww_re, ww_im)
            next_re, next_im = next_re - square * xw_re, next_im - square * xw_im
            xw_re, xw_im, ww_re, ww_im = ww_re, ww_im, next_re, next_im
            next_re, next_im = _multiply(a_re, a_im, wx_re, wx_im)
            next_re, next_im = next_re - square * xx_re, next_im - square * xx_im
            xx_re, xx_im, wx_re, wx_im = wx_re, wx_im, next_re, next_im
        size = tl.maximum(
            tl.maximum(tl.abs(ww_re) + tl.abs(ww_im), tl.abs(xw_re) + tl.abs(xw_im)),
            tl.maximum(tl.abs(wx_re) + tl.abs(wx_im), tl.abs(xx_re) + tl.abs(xx_im)),
        )
        if SOURCE:
            drive = tl.maximum(tl.abs(sw_re) + tl.abs(sw_im), tl.abs(sx_re) + tl.abs(sx_im))
            drive = tl.where(drive == drive, drive, 0.0)  # a NaN of the source stays in psi
            size = tl.maximum(size, tl.maximum(drive, tl.abs(ss)))
        scale = 1.0 / size
        xw_re, xw_im, ww_re, ww_im = xw_re * scale, xw_im * scale, ww_re * scale, ww_im * scale
        xx_re, xx_im, wx_re, wx_im = xx_re * scale, xx_im * scale, wx_re * scale, wx_im * scale
        sw_re, sw_im, sx_re, sx_im = sw_re * scale, sw_im * scale, sx_re * scale, sx_im * scale
        ss = ss * scale
    DIM: tl.constexpr = 3 if SOURCE else 2
    before = origin - 1
    if SITE_HOPPING:
        hop = _load(hopping, before * lanes + lane, mask & (first > 0))
    square = tl.where(first > 0, hop * hop, 0.0)
    ptr = left + (batch * blocks + block) * (DIM * DIM * 2) * lanes
    _put(ptr, 0, 0, DIM, lanes, lane, mask, -square * xx_re, -square * xx_im)
    _put(ptr, 0, DIM - 1, DIM, lanes, lane, mask, xw_re, xw_im)
    _put(ptr, DIM - 1, 0, DIM, lanes, lane, mask, -square * wx_re, -square * wx_im)
    _put(ptr, DIM - 1, DIM - 1, DIM, lanes, lane, mask, ww_re, ww_im)
    if SOURCE:
        _put(ptr, 0, 1, DIM, lanes, lane, mask, zero, zero)
        _put(ptr, 1, 0, DIM, lanes, lane, mask, -square * sx_re, -square * sx_im)
        _put(ptr, 1, 1, DIM, lanes, lane, mask, ss, zero)
        _put(ptr, 1, 2, DIM, lanes, lane, mask, sw_re, sw_im)
        _put(ptr, 2, 1, DIM, lanes, lane, mask, zero, zero)
    if TWO_SIDED:
        if SITE_HOPPING:
            hop = _load(
                hopping, (origin + (stop - 1 - first)) * lanes + lane, mask & (stop < sites)
            )
        square = tl.where(stop < sites, hop * hop, 0.0)
        ptr = right + (batch * blocks + block) * 8 * lanes
        _put(ptr, 0, 0, 2, lanes, lane, mask, -square * xx_re, -square * xx_im)
        _put(ptr, 0, 1, 2, lanes, lane, mask, wx_re, wx_im)
        _put(ptr, 1, 0, 2, lanes, lane, mask, -square * xw_re, -square * xw_im)
        _put(ptr, 1, 1, 2, lanes, lane, mask, ww_re, ww_im)


@triton.jit
def _times(m_re, m_im, x_re, x_im):
    """Products of entries; a zero of the matrix stands for no coupling, to a NaN either."""
    coupled = (m_re != 0) | (m_im != 0)
    y_re, y_im = _multiply(m_re, m_im, x_re, x_im)
    return tl.where(coupled, y_re, 0.0), tl.where(coupled, y_im, 0.0)


@triton.jit
def compose(
    maps, products, blocks, groups, lanes,
    GROUP: tl.constexpr, DIM: tl.constexpr, PAD: tl.constexpr, REVERSE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Products of the matrices of GROUP neighbouring blocks, the first to act rightmost."""
    group, tile, batch = _place(groups, lanes, BLOCK)
    lane = (tile * BLOCK + tl.arange(0, BLOCK))[:, None, None]
    row = tl.arange(0, PAD)[None, :, None]
    column = tl.arange(0, PAD)[None, None, :]
    mask = (lane < lanes) & (row < DIM) & (column < DIM)
    entry = ((row * DIM + column) * 2) * lanes + lane
    re = tl.where(row == column, 1.0, 0.0).to(tl.float64) + tl.zeros([BLOCK, PAD, PAD], tl.float64)
    im = tl.zeros([BLOCK, PAD, PAD], tl.float64)
    first = group * GROUP
    stop = tl.minimum(first + GROUP, blocks)
    for k in range(0, stop - first):
        block = stop - 1 - k if REVERSE else first + k
        base = maps + (batch * blocks + block) * (DIM * DIM * 2) * lanes
        m_re, m_im = _load_pair(base, entry, lanes, mask)
        y_re, y_im = _times(
            m_re[:, :, :, None], m_im[:, :, :, None], re[:, None, :, :], im[:, None, :, :]
        )
        re, im = tl.sum(y_re, axis=2), tl.sum(y_im, axis=2)
        size = tl.abs(re) + tl.abs(im)
        size = tl.where(size == size, size, 0.0)  # likewise
        size = tl.max(tl.max(size, axis=2), axis=1)
        scale = (1.0 / tl.where(size > 0, size, 1.0))[:, None, None]
        re, im = re * scale, im * scale
    base = products + (batch * groups + group) * (DIM * DIM * 2) * lanes
    _store_pair(base, entry, lanes, mask, re, im)


@triton.jit
def enter(
    maps, first_states, states, blocks, groups, lanes,
    GROUP: tl.constexpr, DIM: tl.constexpr, PAD: tl.constexpr, REVERSE: tl.constexpr,
    STARTED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What enters every block of a group (B, blocks, DIM - 1, 2, H), from what enters the group:
    zeros unless STARTED."""
    group, tile, batch = _place(groups, lanes, BLOCK)
    tile = tile * BLOCK + tl.arange(0, BLOCK)
    lane = tile[:, None]
    row = tl.arange(0, PAD)[None, :]
    kept = (lane < lanes) & (row < DIM - 1)
    state = row * 2 * lanes + lane
    re = tl.where(row == DIM - 1, 1.0, 0.0).to(tl.float64) + tl.zeros([BLOCK, PAD], tl.float64)
    im = tl.zeros([BLOCK, PAD], tl.float64)
    if STARTED:
        base = first_states + (batch * groups + group) * ((DIM - 1) * 2) * lanes
        start_re, start_im = _load_pair(base, state, lanes, kept)
        re, im = re + start_re, im + start_im
    wide = tile[:, None, None]
    column = tl.arange(0, PAD)[None, None, :]
    mask = (wide < lanes) & (row[:, :, None] < DIM) & (column < DIM)
    entry = ((row[:, :, None] * DIM + column) * 2) * lanes + wide
    first = group * GROUP
    stop = tl.minimum(first + GROUP, blocks)
    for k in range(0, stop - first):
        block = stop - 1 - k if REVERSE else first + k
        base = states + (batch * blocks + block) * ((DIM - 1) * 2) * lanes
        _store_pair(base, state, lanes, kept, re, im)
        base = maps + (batch * blocks + block) * (DIM * DIM * 2) * lanes
        m_re, m_im = _load_pair(base, entry, lanes, mask)
        y_re, y_im = _times(m_re, m_im, re[:, None, :], im[:, None, :])
        re, im = tl.sum(y_re, axis=2), tl.sum(y_im, axis=2)
        last_re = tl.sum(tl.where(row == DIM - 1, re, 0.0), axis=1)
        last_im = tl.sum(tl.where(row == DIM - 1, im, 0.0), axis=1)
        last_re = tl.where(tile < lanes, last_re, 1.0)
        by_re, by_im = _reciprocal(last_re, last_im)
        re, im = _multiply(re, im, by_re[:, None], by_im[:, None])
        re = tl.where(row == DIM - 1, 1.0, re)
        im = tl.where(row == DIM - 1, 0.0, im)


@triton.jit
def causal(
    v, source, energy, eta, hopping, states, out,
    in_scale, in_zero, in_levels, out_scale, out_zero, out_bounds,
    sites, lanes, blocks, v_batch, v_site, v_lane, s_batch, s_site, s_lane, q_site,
    p_batch, p_site, p_part, p_lane, o_site,
    LENGTH: tl.constexpr, SOURCE: tl.constexpr, STARTED: tl.constexpr,
    SITE_ETA: tl.constexpr, SITE_HOPPING: tl.constexpr,
    BITS: tl.constexpr, LEVELS: tl.constexpr, OUT_LEVELS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """g and psi of every site of a block."""
    block, tile, batch = _place(blocks, lanes, BLOCK)
    lane = tile * BLOCK + tl.arange(0, BLOCK)
    mask = lane < lanes
    first = block * LENGTH
    stop = tl.minimum(first + LENGTH, sites)
    origin = first.to(tl.int64)
    e = _load(energy, lane, mask)
    width = _load(eta, lane, mask)
    hop = _load(hopping, lane, mask)
    g_re = tl.zeros([BLOCK], tl.float64)
    g_im, psi_re, psi_im = g_re, g_re, g_re
    if STARTED:
        PARTS: tl.constexpr = 4 if SOURCE else 2
        base = states + (batch * blocks + block) * PARTS * lanes
        g_re, g_im = _load_pair(base, lane, lanes, mask)
        if SOURCE:
            psi_re, psi_im = _load_pair(base, 2 * lanes + lane, lanes, mask)
    for i in range(first, stop):
        far = origin + (i - first)
        if SITE_ETA:
            width = _load(eta, far * lanes + lane, mask)
        if SITE_HOPPING:
            hop = _load(hopping, (far - 1) * lanes + lane, mask & (i > 0))
        t = tl.where(i > 0, hop, 0.0)
        a_re = _read(
            v, batch * v_batch + far * v_site, v_lane, lane, mask, in_scale, in_zero, in_levels,
            far * q_site, BITS, LEVELS,
        ) - e  # fmt: skip
        a_im = tl.where(mask, -width, -1.0)
        g_re, g_im = _reciprocal(a_re - t * t * g_re, a_im - t * t * g_im)
        row = batch * p_batch + far * p_site
        o_part = tl.maximum(o_site * sites, lanes)
        _emit(
            out, row, 0, g_re, g_im, tile, lane, lanes, mask, p_part, p_lane,
            out_scale, out_zero, out_bounds, far * o_site, o_part, BITS, OUT_LEVELS, BLOCK,
        )  # fmt: skip
        if SOURCE:
            q_part = tl.maximum(q_site * sites, lanes)
            b = _read(
                source, batch * s_batch + far * s_site, s_lane, lane, mask,
                in_scale + q_part, in_zero + q_part, in_levels + (1 << BITS),
                far * q_site, BITS, LEVELS,
            )  # fmt: skip
            psi_re, psi_im = _multiply(g_re, g_im, b + t * psi_re, t * psi_im)
            _emit(
                out, row, 2, psi_re, psi_im, tile, lane, lanes, mask, p_part, p_lane,
                out_scale, out_zero, out_bounds, far * o_site, o_part, BITS, OUT_LEVELS, BLOCK,
            )  # fmt: skip


@triton.jit
def two_sided(
    v, energy, eta, hopping, left, right, from_right, out,
    in_scale, in_zero, in_levels, out_scale, out_zero, out_bounds,
    sites, lanes, blocks, v_batch, v_site, v_lane, q_site,
    r_batch, r_site, r_part, r_lane, p_batch, p_site, p_part, p_lane, o_site,
    LENGTH: tl.constexpr, STARTED: tl.constexpr,
    SITE_ETA: tl.constexpr, SITE_HOPPING: tl.constexpr,
    BITS: tl.constexpr, LEVELS: tl.constexpr, OUT_LEVELS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """G_ii of every site of a block. What comes from the right of a site is kept in `from_right`,
    which may be `out` itself: a place is read before it is overwritten."""
    block, tile, batch = _place(blocks, lanes, BLOCK)
    lane = tile * BLOCK + tl.arange(0, BLOCK)
    mask = lane < lanes
    first = block * LENGTH
    stop = tl.minimum(first + LENGTH, sites)
    origin = first.to(tl.int64)
    e = _load(energy, lane, mask)
    width = _load(eta, lane, mask)
    hop = _load(hopping, lane, mask)
    g_re = tl.zeros([BLOCK], tl.float64)
    g_im, r_re, r_im = g_re, g_re, g_re
    if STARTED:
        base = (batch * blocks + block) * 2 * lanes
        g_re, g_im = _load_pair(left + base, lane, lanes, mask)
        r_re, r_im = _load_pair(right + base, lane, lanes, mask)
    for k in range(0, stop - first):
        i = stop - 1 - k
        far = origin + (i - first)
        if SITE_ETA:
            width = _load(eta, far * lanes + lane, mask)
        if SITE_HOPPING:
            hop = _load(hopping, far * lanes + lane, mask & (i + 1 < sites))
        t = tl.where(i + 1 < sites, hop, 0.0)
        pull_re, pull_im = t * t * r_re, t * t * r_im
        row = batch * r_batch + far * r_site + lane * r_lane
        _store_pair(from_right, row, r_part, mask, pull_re, pull_im)
        a_re = _read(
            v, batch * v_batch + far * v_site, v_lane, lane, mask, in_scale, in_zero, in_levels,
            far * q_site, BITS, LEVELS,
        ) - e  # fmt: skip
        a_im = tl.where(mask, -width, -1.0)
        r_re, r_im = _reciprocal(a_re - pull_re, a_im - pull_im)
    tl.debug_barrier()
    for i in range(first, stop):
        far = origin + (i - first)
        if SITE_ETA:
            width = _load(eta, far * lanes + lane, mask)
        if SITE_HOPPING:
            hop = _load(hopping, (far - 1) * lanes + lane, mask & (i > 0))
        t = tl.where(i > 0, hop, 0.0)
        a_re = _read(
            v, batch * v_batch + far * v_site, v_lane, lane, mask, in_scale, in_zero, in_levels,
            far * q_site, BITS, LEVELS,
        ) - e  # fmt: skip
        a_im = tl.where(mask, -width, -1.0)
        a_re, a_im = a_re - t * t * g_re, a_im - t * t * g_im
        row = batch * r_batch + far * r_site + lane * r_lane
        pull_re, pull_im = _load_pair(from_right, row, r_part, mask)
        center_re, center_im = _reciprocal(a_re - pull_re, a_im - pull_im)
        g_re, g_im = _reciprocal(a_re, a_im)
        o_part = tl.maximum(o_site * sites, lanes)
        _emit(
            out, batch * p_batch + far * p_site, 0, center_re, center_im, tile, lane, lanes, mask,
            p_part, p_lane, out_scale, out_zero, out_bounds, far * o_site, o_part,
            BITS, OUT_LEVELS, BLOCK,
        )  # fmt: skip


@triton.jit
def causal_adjoint_maps(
    parts, grad, source, hopping, maps,
    sites, lanes, blocks, p_batch, p_site, p_part, p_lane, s_batch, s_site, s_lane,
    LENGTH: tl.constexpr, SOURCE: tl.constexpr, SITE_HOPPING: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What every block does to (Q, P) from its right, or to P alone without a source."""
    block, tile, batch = _place(blocks, lanes, BLOCK)
    lane = tile * BLOCK + tl.arange(0, BLOCK)
    mask = lane < lanes
    first = block * LENGTH
    stop = tl.minimum(first + LENGTH, sites)
    origin = first.to(tl.int64)
    hop = _load(hopping, lane, mask)
    zero = tl.zeros([BLOCK], tl.float64)
    one = zero + 1.0
    # Q = q + reach Q_in,   P = p + mixed Q_in + reach^2 P_in
    q_re, q_im, p_re, p_im, mixed_re, mixed_im = zero, zero, zero, zero, zero, zero
    reach_re, reach_im = one, zero
    for k in range(0, stop - first):
        i = stop - 1 - k
        far = origin + (i - first)
        row = batch * p_batch + far * p_site + lane * p_lane
        if SITE_HOPPING:
            hop = _load(hopping, far * lanes + lane, mask & (i + 1 < sites))
        t = tl.where(i + 1 < sites, hop, 0.0)
        g_re, g_im = _load_pair(parts, row, p_part, mask)
        c_re, c_im = _load_pair(grad, row, p_part, mask)
        p_re, p_im = c_re + t * t * p_re, -c_im + t * t * p_im
        mixed_re, mixed_im = t * t * mixed_re, t * t * mixed_im
        if SOURCE:
            if SITE_HOPPING:
                hop = _load(hopping, (far - 1) * lanes + lane, mask & (i > 0))
            before = tl.where(i > 0, hop, 0.0)
            old_re, old_im = _load_pair(parts, row - p_site + 2 * p_part, p_part, mask & (i > 0))
            b = _load(source, batch * s_batch + far * s_site + lane * s_lane, mask)
            u_re, u_im = b + before * old_re, before * old_im
            d_re, d_im = _load_pair(grad, row + 2 * p_part, p_part, mask)
            mu_re, mu_im = d_re + t * q_re, -d_im + t * q_im
            more_re, more_im = _multiply(mu_re, mu_im, u_re, u_im)
            p_re, p_im = p_re + more_re, p_im + more_im
            more_re, more_im = _multiply(t * reach_re, t * reach_im, u_re, u_im)
            mixed_re, mixed_im = mixed_re + more_re, mixed_im + more_im
            q_re, q_im = _multiply(mu_re, mu_im, g_re, g_im)
        reach_re, reach_im = _multiply(t * reach_re, t * reach_im, g_re, g_im)
        square_re, square_im = _multiply(g_re, g_im, g_re, g_im)
        p_re, p_im = _multiply(p_re, p_im, square_re, square_im)
        mixed_re, mixed_im = _multiply(mixed_re, mixed_im, square_re, square_im)
    square_re, square_im = _multiply(reach_re, reach_im, reach_re, reach_im)
    DIM: tl.constexpr = 3 if SOURCE else 2
    ptr = maps + (batch * blocks + block) * (DIM * DIM * 2) * lanes
    _put(ptr, DIM - 2, DIM - 2, DIM, lanes, lane, mask, square_re, square_im)
    _put(ptr, DIM - 2, DIM - 1, DIM, lanes, lane, mask, p_re, p_im)
    _put(ptr, DIM - 1, DIM - 2, DIM, lanes, lane, mask, zero, zero)
    _put(ptr, DIM - 1, DIM - 1, DIM, lanes, lane, mask, one, zero)
    if SOURCE:
        _put(ptr, 0, 0, DIM, lanes, lane, mask, reach_re, reach_im)
        _put(ptr, 0, 1, DIM, lanes, lane, mask, zero, zero)
        _put(ptr, 0, 2, DIM, lanes, lane, mask, q_re, q_im)
        _put(ptr, 1, 0, DIM, lanes, lane, mask, mixed_re, mixed_im)
        _put(ptr, 2, 0, DIM, lanes, lane, mask, zero, zero)


@triton.jit
def causal_adjoint(
    parts, grad, source, hopping, states, dv, dsource, denergy, deta, dhopping,
    sites, lanes, blocks, p_batch, p_site, p_part, p_lane, s_batch, s_site, s_lane,
    d_batch, d_site, d_lane,
    LENGTH: tl.constexpr, SOURCE: tl.constexpr, STARTED: tl.constexpr,
    SITE_ETA: tl.constexpr, SITE_HOPPING: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of every site of a block; those of shared parameters summed over the block."""
    block, tile, batch = _place(blocks, lanes, BLOCK)
    lane = tile * BLOCK + tl.arange(0, BLOCK)
    mask = lane < lanes
    first = block * LENGTH
    stop = tl.minimum(first + LENGTH, sites)
    origin = first.to(tl.int64)
    hop = _load(hopping, lane, mask)
    q_re = tl.zeros([BLOCK], tl.float64)
    q_im, p_re, p_im, sum_re, sum_im, bond = q_re, q_re, q_re, q_re, q_re, q_re
    if STARTED:
        PARTS: tl.constexpr = 4 if SOURCE else 2
        base = states + (batch * blocks + block) * PARTS * lanes
        if SOURCE:
            q_re, q_im = _load_pair(base, lane, lanes, mask)
        p_re, p_im = _load_pair(base, (PARTS - 2) * lanes + lane, lanes, mask)
    for k in range(0, stop - first):
        i = stop - 1 - k
        far = origin + (i - first)
        row = batch * p_batch + far * p_site + lane * p_lane
        if SITE_HOPPING:
            hop = _load(hopping, far * lanes + lane, mask & (i + 1 < sites))
        t = tl.where(i + 1 < sites, hop, 0.0)
        if SITE_HOPPING:
            hop = _load(hopping, (far - 1) * lanes + lane, mask & (i > 0))
        before = tl.where(i > 0, hop, 0.0)
        g_re, g_im = _load_pair(parts, row, p_part, mask)
        c_re, c_im = _load_pair(grad, row, p_part, mask)
        p_re, p_im = c_re + t * t * p_re, -c_im + t * t * p_im
        place = batch * d_batch + far * d_site + lane * d_lane
        if SOURCE:
            old_re, old_im = _load_pair(parts, row - p_site + 2 * p_part, p_part, mask & (i > 0))
            b = _load(source, batch * s_batch + far * s_site + lane * s_lane, mask)
            d_re, d_im = _load_pair(grad, row + 2 * p_part, p_part, mask)
            mu_re, mu_im = d_re + t * q_re, -d_im + t * q_im
            more_re, more_im = _multiply(mu_re, mu_im, b + before * old_re, before * old_im)
            p_re, p_im = p_re + more_re, p_im + more_im
            q_re, q_im = _multiply(mu_re, mu_im, g_re, g_im)
            _store(dsource, place, mask, q_re)
        square_re, square_im = _multiply(g_re, g_im, g_re, g_im)
        p_re, p_im = _multiply(p_re, p_im, square_re, square_im)
        _store(dv, place, mask, -p_re)
        g_re, g_im = _load_pair(parts, row - p_site, p_part, mask & (i > 0))
        dt = 2.0 * before * (p_re * g_re - p_im * g_im)
        if SOURCE:
            dt += q_re * old_re - q_im * old_im
        sum_re += p_re
        at = (batch * sites + far) * lanes + lane
        if SITE_ETA:
            _store(deta, at, mask, -p_im)
        else:
            sum_im -= p_im
        if SITE_HOPPING:
            _store(dhopping, at - (batch + 1) * lanes, mask & (i > 0), dt)
        else:
            bond += tl.where(i > 0, dt, 0.0)
    total = (batch * blocks + block) * lanes + lane
    _store(denergy, total, mask, sum_re)
    if not SITE_ETA:
        _store(deta, total, mask, sum_im)
    if not SITE_HOPPING:
        _store(dhopping, total, mask, bond)


@triton.jit
def two_sided_adjoint_maps(
    v, grad, energy, eta, hopping, left, right, left_maps, right_maps,
    sites, lanes, blocks, v_batch, v_site, v_lane, p_batch, p_site, p_part, p_lane,
    LENGTH: tl.constexpr, SITE_ETA: tl.constexpr, SITE_HOPPING: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """What every block does to T = c + S from its left, and to T' = c + S' from its right."""
    block, tile, batch = _place(blocks, lanes, BLOCK)
    lane = tile * BLOCK + tl.arange(0, BLOCK)
    mask = lane < lanes
    first = block * LENGTH
    stop = tl.minimum(first + LENGTH, sites)
    origin = first.to(tl.int64)
    e = _load(energy, lane, mask)
    width = _load(eta, lane, mask)
    hop = _load(hopping, lane, mask)
    zero = tl.zeros([BLOCK], tl.float64)
    one = zero + 1.0
    base = (batch * blocks + block) * 2 * lanes
    for side in tl.static_range(2):
        # T = sum + reach T_in; near is the g or r of the site before, on the side it comes from.
        near_re, near_im = _load_pair(right + base if side else left + base, lane, lanes, mask)
        sum_re, sum_im, reach_re, reach_im = zero, zero, one, zero
        for k in range(0, stop - first):
            i = stop - 1 - k if side else first + k
            inner = i + 1 < sites if side else i > 0
            far = origin + (i - first)
            if SITE_ETA:
                width = _load(eta, far * lanes + lane, mask)
            if SITE_HOPPING:
                hop = _load(hopping, (far - 1 + side) * lanes + lane, mask & inner)
            t = tl.where(inner, hop, 0.0)
            step_re, step_im = _multiply(t * near_re, t * near_im, t * near_re, t * near_im)
            row = batch * p_batch + far * p_site + lane * p_lane
            c_re, c_im = _load_pair(grad, row, p_part, mask)
            sum_re, sum_im = _multiply(step_re, step_im, sum_re, sum_im)
            sum_re, sum_im = c_re + sum_re, -c_im + sum_im
            reach_re, reach_im = _multiply(step_re, step_im, reach_re, reach_im)
            a_re = _load(v, batch * v_batch + far * v_site + lane * v_lane, mask) - e
            a_im = tl.where(mask, -width, -1.0)
            near_re, near_im = _reciprocal(a_re - t * t * near_re, a_im - t * t * near_im)
        ptr = (right_maps if side else left_maps) + (batch * blocks + block) * 8 * lanes
        _put(ptr, 0, 0, 2, lanes, lane, mask, reach_re, reach_im)
        _put(ptr, 0, 1, 2, lanes, lane, mask, sum_re, sum_im)
        _put(ptr, 1, 0, 2, lanes, lane, mask, zero, zero)
        _put(ptr, 1, 1, 2, lanes, lane, mask, one, zero)


@triton.jit
def two_sided_adjoint(
    v, grad, parts, energy, eta, hopping, left, right, left_sums, right_sums, from_right,
    dv, denergy, deta, dhopping,
    sites, lanes, blocks, v_batch, v_site, v_lane, p_batch, p_site, p_part, p_lane,
    r_batch, r_site, r_part, r_lane, d_batch, d_site, d_lane,
    LENGTH: tl.constexpr, STARTED: tl.constexpr, SITE_ETA: tl.constexpr,
    SITE_HOPPING: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of every site of a block; those of shared parameters summed over the block."""
    block, tile, batch = _place(blocks, lanes, BLOCK)
    lane = tile * BLOCK + tl.arange(0, BLOCK)
    mask = lane < lanes
    first = block * LENGTH
    stop = tl.minimum(first + LENGTH, sites)
    origin = first.to(tl.int64)
    e = _load(energy, lane, mask)
    width = _load(eta, lane, mask)
    hop = _load(hopping, lane, mask)
    g_re = tl.zeros([BLOCK], tl.float64)
    g_im, r_re, r_im, sum_re, sum_im = g_re, g_re, g_re, g_re, g_re
    back_re, back_im, total_re, total_im, bond = g_re, g_re, g_re, g_re, g_re
    if STARTED:
        base = (batch * blocks + block) * 2 * lanes
        g_re, g_im = _load_pair(left + base, lane, lanes, mask)
        r_re, r_im = _load_pair(right + base, lane, lanes, mask)
        sum_re, sum_im = _load_pair(left_sums + base, lane, lanes, mask)
        back_re, back_im = _load_pair(right_sums + base, lane, lanes, mask)
    for k in range(0, stop - first):
        i = stop - 1 - k
        far = origin + (i - first)
        if SITE_ETA:
            width = _load(eta, far * lanes + lane, mask)
        if SITE_HOPPING:
            hop = _load(hopping, far * lanes + lane, mask & (i + 1 < sites))
        t = tl.where(i + 1 < sites, hop, 0.0)
        step_re, step_im = _multiply(t * r_re, t * r_im, t * r_re, t * r_im)
        row = batch * p_batch + far * p_site + lane * p_lane
        c_re, c_im = _load_pair(grad, row, p_part, mask)
        back_re, back_im = _multiply(step_re, step_im, back_re, back_im)
        back_re, back_im = c_re + back_re, -c_im + back_im
        a_re = _load(v, batch * v_batch + far * v_site + lane * v_lane, mask) - e
        a_im = tl.where(mask, -width, -1.0)
        r_re, r_im = _reciprocal(a_re - t * t * r_re, a_im - t * t * r_im)
        row = batch * r_batch + far * r_site + lane * r_lane
        _store_pair(from_right, row, r_part, mask, r_re, r_im)
        _store_pair(from_right, row + 2 * r_part, r_part, mask, back_re, back_im)
    tl.debug_barrier()
    row = batch * p_batch + origin * p_site + lane * p_lane
    center_re, center_im = _load_pair(parts, row - p_site, p_part, mask & (first > 0))
    for i in range(first, stop):
        far = origin + (i - first)
        if SITE_ETA:
            width = _load(eta, far * lanes + lane, mask)
        if SITE_HOPPING:
            hop = _load(hopping, (far - 1) * lanes + lane, mask & (i > 0))
        t = tl.where(i > 0, hop, 0.0)
        # G^2 T of the site before, which reaches this one over r.
        w_re, w_im = _multiply(center_re, center_im, center_re, center_im)
        w_re, w_im = _multiply(w_re, w_im, sum_re, sum_im)
        row = batch * r_batch + far * r_site + lane * r_lane
        r_re, r_im = _load_pair(from_right, row, r_part, mask)
        back_re, back_im = _load_pair(from_right, row + 2 * r_part, r_part, mask)
        dt = r_re * w_re - r_im * w_im
        row = batch * p_batch + far * p_site + lane * p_lane
        center_re, center_im = _load_pair(parts, row, p_part, mask)
        square_re, square_im = _multiply(center_re, center_im, center_re, center_im)
        w_re, w_im = _multiply(square_re, square_im, back_re, back_im)
        dt = 2.0 * t * (dt + g_re * w_re - g_im * w_im)
        c_re, c_im = _load_pair(grad, row, p_part, mask)
        step_re, step_im = _multiply(t * g_re, t * g_im, t * g_re, t * g_im)
        sum_re, sum_im = _multiply(step_re, step_im, sum_re, sum_im)
        w_re, w_im = _multiply(square_re, square_im, sum_re + back_re, sum_im + back_im)
        sum_re, sum_im = c_re + sum_re, -c_im + sum_im
        a_re = _load(v, batch * v_batch + far * v_site + lane * v_lane, mask) - e
        a_im = tl.where(mask, -width, -1.0)
        g_re, g_im = _reciprocal(a_re - t * t * g_re, a_im - t * t * g_im)
        _store(dv, batch * d_batch + far * d_site + lane * d_lane, mask, -w_re)
        total_re += w_re
        at = (batch * sites + far) * lanes + lane
        if SITE_ETA:
            _store(deta, at, mask, -w_im)
        else:
            total_im -= w_im
        if SITE_HOPPING:
            _store(dhopping, at - (batch + 1) * lanes, mask & (i > 0), dt)
        else:
            bond += tl.where(i > 0, dt, 0.0)
    total = (batch * blocks + block) * lanes + lane
    _store(denergy, total, mask, total_re)
    if not SITE_ETA:
        _store(deta, total, mask, total_im)
    if not SITE_HOPPING:
        _store(dhopping, total, mask, bond)


@triton.jit
def one_site(
    state, v, source, energy, eta, hopping, count, lanes,
    SOURCE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Move `count` = B * H chains one site ahead, in place; all tensors are contiguous."""
    chain = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = chain < count
    lane = chain % lanes
    PARTS: tl.constexpr = 4 if SOURCE else 2
    place = (chain // lanes) * PARTS * lanes + lane
    t = _load(hopping, lane, mask)
    g_re, g_im = _load_pair(state, place, lanes, mask)
    a_re = _load(v, chain, mask) - _load(energy, lane, mask)
    a_im = tl.where(mask, -_load(eta, lane, mask), -1.0)
    g_re, g_im = _reciprocal(a_re - t * t * g_re, a_im - t * t * g_im)
    _store_pair(state, place, lanes, mask, g_re, g_im)
    if SOURCE:
        psi_re, psi_im = _load_pair(state, place + 2 * lanes, lanes, mask)
        b = _load(source, chain, mask)
        psi_re, psi_im = _multiply(g_re, g_im, b + t * psi_re, t * psi_im)
        _store_pair(state, place + 2 * lanes, lanes, mask, psi_re, psi_im)
