"""Triton kernels of the sweep, parallel over batch, lanes and blocks of sites.

Imported only if Triton is available (see `launch.py`); formulas and derivatives are those of
`bkcore.kernels.ops.sweep`. A chain is cut into blocks of LENGTH sites. A first kernel computes the
map of each block from its incoming to its outgoing state, two small ones (`compose`, `enter`)
compute the state that enters each block, and a last one sweeps every block from there. Nothing is
approximated: there is no warm-up window.

The map of a block is linear in homogeneous coordinates. With g = x / w and psi = s / w, one site is

    x' = w,   w' = A_i w - t_{i-1}^2 x,   s' = b_i w + t_{i-1} s

(the continuants of the continued fraction; Jones and Thron, Continued Fractions, section 2.1). A
block's matrix is the product of its sites' matrices. Its columns are swept side by side, and scaled
by a common factor every few sites, which changes no quotient. The adjoints are affine in (Q, P), or
in one number from either side, and so linear in (Q, P, 1). The last coordinate of every state is
the divisor; `compose` multiplies such matrices and `enter` applies them.

Where two blocks meet, the last g of one must agree with the g that the next one started from, to
far below the round-off of the result. That g may carry a forward error, which can exceed a backward
error by a factor of up to 1/eta. So everything between loading and storing is float64. float64
tensors are swept in one block.
"""

from __future__ import annotations

import triton
import triton.language as tl

from bkcore.kernels.backends.triton.pieces import (
    RESCALED,
    emit,
    load,
    load_pair,
    multiply,
    program_place,
    put,
    read,
    reciprocal,
    store_pair,
)


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
    block, tile, batch = program_place(blocks, lanes, BLOCK)
    lane = tile * BLOCK + tl.arange(0, BLOCK)
    mask = lane < lanes
    first = block * LENGTH
    stop = tl.minimum(first + LENGTH, sites)
    origin = first.to(tl.int64)
    e = load(energy, lane, mask)
    width = load(eta, lane, mask)
    hop = load(hopping, lane, mask)
    zero = tl.zeros([BLOCK], tl.float64)
    one = zero + 1.0
    # Columns of the matrix: the images of w = 1, of x (with a bond of t^2 = -1, corrected at the
    # end) and of s.
    xw_re, xw_im, ww_re, ww_im, sw_re, sw_im = zero, zero, one, zero, zero, zero
    xx_re, xx_im, wx_re, wx_im, sx_re, sx_im = one, zero, zero, zero, zero, zero
    ss = one
    for chunk in range(first, stop, RESCALED):
        for i in range(chunk, tl.minimum(chunk + RESCALED, stop)):
            far = origin + (i - first)
            if SITE_ETA:
                width = load(eta, far * lanes + lane, mask)
            if SITE_HOPPING:
                hop = load(hopping, (far - 1) * lanes + lane, mask & (i > 0))
            t = tl.where(i > 0, hop, 0.0)
            square = tl.where(i > first, t * t, -1.0)
            a_re = read(
                v, batch * v_batch + far * v_site, v_lane, lane, mask, in_scale, in_zero,
                in_levels, far * q_site, BITS, LEVELS,
            ) - e  # fmt: skip
            a_im = tl.where(mask, -width, -1.0)
            if SOURCE:
                q_part = tl.maximum(q_site * sites, lanes)
                b = read(
                    source, batch * s_batch + far * s_site, s_lane, lane, mask,
                    in_scale + q_part, in_zero + q_part, in_levels + (1 << BITS),
                    far * q_site, BITS, LEVELS,
                )  # fmt: skip
                sw_re, sw_im = b * ww_re + t * sw_re, b * ww_im + t * sw_im
                sx_re, sx_im = b * wx_re + t * sx_re, b * wx_im + t * sx_im
                ss = t * ss
            next_re, next_im = multiply(a_re, a_im, ww_re, ww_im)
            next_re, next_im = next_re - square * xw_re, next_im - square * xw_im
            xw_re, xw_im, ww_re, ww_im = ww_re, ww_im, next_re, next_im
            next_re, next_im = multiply(a_re, a_im, wx_re, wx_im)
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
        hop = load(hopping, before * lanes + lane, mask & (first > 0))
    square = tl.where(first > 0, hop * hop, 0.0)
    ptr = left + (batch * blocks + block) * (DIM * DIM * 2) * lanes
    put(ptr, 0, 0, DIM, lanes, lane, mask, -square * xx_re, -square * xx_im)
    put(ptr, 0, DIM - 1, DIM, lanes, lane, mask, xw_re, xw_im)
    put(ptr, DIM - 1, 0, DIM, lanes, lane, mask, -square * wx_re, -square * wx_im)
    put(ptr, DIM - 1, DIM - 1, DIM, lanes, lane, mask, ww_re, ww_im)
    if SOURCE:
        put(ptr, 0, 1, DIM, lanes, lane, mask, zero, zero)
        put(ptr, 1, 0, DIM, lanes, lane, mask, -square * sx_re, -square * sx_im)
        put(ptr, 1, 1, DIM, lanes, lane, mask, ss, zero)
        put(ptr, 1, 2, DIM, lanes, lane, mask, sw_re, sw_im)
        put(ptr, 2, 1, DIM, lanes, lane, mask, zero, zero)
    if TWO_SIDED:
        if SITE_HOPPING:
            hop = load(hopping, (origin + (stop - 1 - first)) * lanes + lane, mask & (stop < sites))
        square = tl.where(stop < sites, hop * hop, 0.0)
        ptr = right + (batch * blocks + block) * 8 * lanes
        put(ptr, 0, 0, 2, lanes, lane, mask, -square * xx_re, -square * xx_im)
        put(ptr, 0, 1, 2, lanes, lane, mask, wx_re, wx_im)
        put(ptr, 1, 0, 2, lanes, lane, mask, -square * xw_re, -square * xw_im)
        put(ptr, 1, 1, 2, lanes, lane, mask, ww_re, ww_im)


@triton.jit
def times(m_re, m_im, x_re, x_im):
    """Products of entries; a zero in the matrix means no coupling, so 0 times NaN is 0."""
    coupled = (m_re != 0) | (m_im != 0)
    y_re, y_im = multiply(m_re, m_im, x_re, x_im)
    return tl.where(coupled, y_re, 0.0), tl.where(coupled, y_im, 0.0)


@triton.jit
def compose(
    maps, products, blocks, groups, lanes,
    GROUP: tl.constexpr, DIM: tl.constexpr, PAD: tl.constexpr, REVERSE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Products of the matrices of GROUP neighbouring blocks, with the first block rightmost."""
    group, tile, batch = program_place(groups, lanes, BLOCK)
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
        m_re, m_im = load_pair(base, entry, lanes, mask)
        y_re, y_im = times(
            m_re[:, :, :, None], m_im[:, :, :, None], re[:, None, :, :], im[:, None, :, :]
        )
        re, im = tl.sum(y_re, axis=2), tl.sum(y_im, axis=2)
        size = tl.abs(re) + tl.abs(im)
        size = tl.where(size == size, size, 0.0)  # likewise
        size = tl.max(tl.max(size, axis=2), axis=1)
        scale = (1.0 / tl.where(size > 0, size, 1.0))[:, None, None]
        re, im = re * scale, im * scale
    base = products + (batch * groups + group) * (DIM * DIM * 2) * lanes
    store_pair(base, entry, lanes, mask, re, im)


@triton.jit
def enter(
    maps, first_states, states, blocks, groups, lanes,
    GROUP: tl.constexpr, DIM: tl.constexpr, PAD: tl.constexpr, REVERSE: tl.constexpr,
    STARTED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The state that enters every block of a group (B, blocks, DIM - 1, 2, H), from the state that
    enters the group: zeros unless STARTED."""
    group, tile, batch = program_place(groups, lanes, BLOCK)
    tile = tile * BLOCK + tl.arange(0, BLOCK)
    lane = tile[:, None]
    row = tl.arange(0, PAD)[None, :]
    kept = (lane < lanes) & (row < DIM - 1)
    state = row * 2 * lanes + lane
    re = tl.where(row == DIM - 1, 1.0, 0.0).to(tl.float64) + tl.zeros([BLOCK, PAD], tl.float64)
    im = tl.zeros([BLOCK, PAD], tl.float64)
    if STARTED:
        base = first_states + (batch * groups + group) * ((DIM - 1) * 2) * lanes
        start_re, start_im = load_pair(base, state, lanes, kept)
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
        store_pair(base, state, lanes, kept, re, im)
        base = maps + (batch * blocks + block) * (DIM * DIM * 2) * lanes
        m_re, m_im = load_pair(base, entry, lanes, mask)
        y_re, y_im = times(m_re, m_im, re[:, None, :], im[:, None, :])
        re, im = tl.sum(y_re, axis=2), tl.sum(y_im, axis=2)
        last_re = tl.sum(tl.where(row == DIM - 1, re, 0.0), axis=1)
        last_im = tl.sum(tl.where(row == DIM - 1, im, 0.0), axis=1)
        last_re = tl.where(tile < lanes, last_re, 1.0)
        by_re, by_im = reciprocal(last_re, last_im)
        re, im = multiply(re, im, by_re[:, None], by_im[:, None])
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
    block, tile, batch = program_place(blocks, lanes, BLOCK)
    lane = tile * BLOCK + tl.arange(0, BLOCK)
    mask = lane < lanes
    first = block * LENGTH
    stop = tl.minimum(first + LENGTH, sites)
    origin = first.to(tl.int64)
    e = load(energy, lane, mask)
    width = load(eta, lane, mask)
    hop = load(hopping, lane, mask)
    g_re = tl.zeros([BLOCK], tl.float64)
    g_im, psi_re, psi_im = g_re, g_re, g_re
    if STARTED:
        PARTS: tl.constexpr = 4 if SOURCE else 2
        base = states + (batch * blocks + block) * PARTS * lanes
        g_re, g_im = load_pair(base, lane, lanes, mask)
        if SOURCE:
            psi_re, psi_im = load_pair(base, 2 * lanes + lane, lanes, mask)
    for i in range(first, stop):
        far = origin + (i - first)
        if SITE_ETA:
            width = load(eta, far * lanes + lane, mask)
        if SITE_HOPPING:
            hop = load(hopping, (far - 1) * lanes + lane, mask & (i > 0))
        t = tl.where(i > 0, hop, 0.0)
        a_re = read(
            v, batch * v_batch + far * v_site, v_lane, lane, mask, in_scale, in_zero, in_levels,
            far * q_site, BITS, LEVELS,
        ) - e  # fmt: skip
        a_im = tl.where(mask, -width, -1.0)
        g_re, g_im = reciprocal(a_re - t * t * g_re, a_im - t * t * g_im)
        row = batch * p_batch + far * p_site
        o_part = tl.maximum(o_site * sites, lanes)
        emit(
            out, row, 0, g_re, g_im, tile, lane, lanes, mask, p_part, p_lane,
            out_scale, out_zero, out_bounds, far * o_site, o_part, BITS, OUT_LEVELS, BLOCK,
        )  # fmt: skip
        if SOURCE:
            q_part = tl.maximum(q_site * sites, lanes)
            b = read(
                source, batch * s_batch + far * s_site, s_lane, lane, mask,
                in_scale + q_part, in_zero + q_part, in_levels + (1 << BITS),
                far * q_site, BITS, LEVELS,
            )  # fmt: skip
            psi_re, psi_im = multiply(g_re, g_im, b + t * psi_re, t * psi_im)
            emit(
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
    """G_ii of every site of a block. The part from the right of a site is kept in `from_right`,
    which may be `out` itself, since every element is read before it is overwritten."""
    block, tile, batch = program_place(blocks, lanes, BLOCK)
    lane = tile * BLOCK + tl.arange(0, BLOCK)
    mask = lane < lanes
    first = block * LENGTH
    stop = tl.minimum(first + LENGTH, sites)
    origin = first.to(tl.int64)
    e = load(energy, lane, mask)
    width = load(eta, lane, mask)
    hop = load(hopping, lane, mask)
    g_re = tl.zeros([BLOCK], tl.float64)
    g_im, r_re, r_im = g_re, g_re, g_re
    if STARTED:
        base = (batch * blocks + block) * 2 * lanes
        g_re, g_im = load_pair(left + base, lane, lanes, mask)
        r_re, r_im = load_pair(right + base, lane, lanes, mask)
    for k in range(0, stop - first):
        i = stop - 1 - k
        far = origin + (i - first)
        if SITE_ETA:
            width = load(eta, far * lanes + lane, mask)
        if SITE_HOPPING:
            hop = load(hopping, far * lanes + lane, mask & (i + 1 < sites))
        t = tl.where(i + 1 < sites, hop, 0.0)
        pull_re, pull_im = t * t * r_re, t * t * r_im
        row = batch * r_batch + far * r_site + lane * r_lane
        store_pair(from_right, row, r_part, mask, pull_re, pull_im)
        a_re = read(
            v, batch * v_batch + far * v_site, v_lane, lane, mask, in_scale, in_zero, in_levels,
            far * q_site, BITS, LEVELS,
        ) - e  # fmt: skip
        a_im = tl.where(mask, -width, -1.0)
        r_re, r_im = reciprocal(a_re - pull_re, a_im - pull_im)
    tl.debug_barrier()
    for i in range(first, stop):
        far = origin + (i - first)
        if SITE_ETA:
            width = load(eta, far * lanes + lane, mask)
        if SITE_HOPPING:
            hop = load(hopping, (far - 1) * lanes + lane, mask & (i > 0))
        t = tl.where(i > 0, hop, 0.0)
        a_re = read(
            v, batch * v_batch + far * v_site, v_lane, lane, mask, in_scale, in_zero, in_levels,
            far * q_site, BITS, LEVELS,
        ) - e  # fmt: skip
        a_im = tl.where(mask, -width, -1.0)
        a_re, a_im = a_re - t * t * g_re, a_im - t * t * g_im
        row = batch * r_batch + far * r_site + lane * r_lane
        pull_re, pull_im = load_pair(from_right, row, r_part, mask)
        center_re, center_im = reciprocal(a_re - pull_re, a_im - pull_im)
        g_re, g_im = reciprocal(a_re, a_im)
        o_part = tl.maximum(o_site * sites, lanes)
        emit(
            out, batch * p_batch + far * p_site, 0, center_re, center_im, tile, lane, lanes, mask,
            p_part, p_lane, out_scale, out_zero, out_bounds, far * o_site, o_part,
            BITS, OUT_LEVELS, BLOCK,
        )  # fmt: skip


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
    t = load(hopping, lane, mask)
    g_re, g_im = load_pair(state, place, lanes, mask)
    a_re = load(v, chain, mask) - load(energy, lane, mask)
    a_im = tl.where(mask, -load(eta, lane, mask), -1.0)
    g_re, g_im = reciprocal(a_re - t * t * g_re, a_im - t * t * g_im)
    store_pair(state, place, lanes, mask, g_re, g_im)
    if SOURCE:
        psi_re, psi_im = load_pair(state, place + 2 * lanes, lanes, mask)
        b = load(source, chain, mask)
        psi_re, psi_im = multiply(g_re, g_im, b + t * psi_re, t * psi_im)
        store_pair(state, place + 2 * lanes, lanes, mask, psi_re, psi_im)
