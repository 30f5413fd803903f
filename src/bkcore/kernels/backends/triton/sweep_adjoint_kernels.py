"""Triton kernels of the adjoint of the sweep, cut into blocks as in `sweep_kernels`."""

from __future__ import annotations

import triton
import triton.language as tl

from bkcore.kernels.backends.triton.pieces import (
    load,
    load_pair,
    multiply,
    program_place,
    put,
    reciprocal,
    store,
    store_pair,
)


@triton.jit
def causal_adjoint_maps(
    parts, grad, source, hopping, maps,
    sites, lanes, blocks, p_batch, p_site, p_part, p_lane, s_batch, s_site, s_lane,
    LENGTH: tl.constexpr, SOURCE: tl.constexpr, SITE_HOPPING: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What every block does to (Q, P) from its right, or to P alone without a source."""
    block, tile, batch = program_place(blocks, lanes, BLOCK)
    lane = tile * BLOCK + tl.arange(0, BLOCK)
    mask = lane < lanes
    first = block * LENGTH
    stop = tl.minimum(first + LENGTH, sites)
    origin = first.to(tl.int64)
    hop = load(hopping, lane, mask)
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
            hop = load(hopping, far * lanes + lane, mask & (i + 1 < sites))
        t = tl.where(i + 1 < sites, hop, 0.0)
        g_re, g_im = load_pair(parts, row, p_part, mask)
        c_re, c_im = load_pair(grad, row, p_part, mask)
        p_re, p_im = c_re + t * t * p_re, -c_im + t * t * p_im
        mixed_re, mixed_im = t * t * mixed_re, t * t * mixed_im
        if SOURCE:
            if SITE_HOPPING:
                hop = load(hopping, (far - 1) * lanes + lane, mask & (i > 0))
            before = tl.where(i > 0, hop, 0.0)
            old_re, old_im = load_pair(parts, row - p_site + 2 * p_part, p_part, mask & (i > 0))
            b = load(source, batch * s_batch + far * s_site + lane * s_lane, mask)
            u_re, u_im = b + before * old_re, before * old_im
            d_re, d_im = load_pair(grad, row + 2 * p_part, p_part, mask)
            mu_re, mu_im = d_re + t * q_re, -d_im + t * q_im
            more_re, more_im = multiply(mu_re, mu_im, u_re, u_im)
            p_re, p_im = p_re + more_re, p_im + more_im
            more_re, more_im = multiply(t * reach_re, t * reach_im, u_re, u_im)
            mixed_re, mixed_im = mixed_re + more_re, mixed_im + more_im
            q_re, q_im = multiply(mu_re, mu_im, g_re, g_im)
        reach_re, reach_im = multiply(t * reach_re, t * reach_im, g_re, g_im)
        square_re, square_im = multiply(g_re, g_im, g_re, g_im)
        p_re, p_im = multiply(p_re, p_im, square_re, square_im)
        mixed_re, mixed_im = multiply(mixed_re, mixed_im, square_re, square_im)
    square_re, square_im = multiply(reach_re, reach_im, reach_re, reach_im)
    DIM: tl.constexpr = 3 if SOURCE else 2
    ptr = maps + (batch * blocks + block) * (DIM * DIM * 2) * lanes
    put(ptr, DIM - 2, DIM - 2, DIM, lanes, lane, mask, square_re, square_im)
    put(ptr, DIM - 2, DIM - 1, DIM, lanes, lane, mask, p_re, p_im)
    put(ptr, DIM - 1, DIM - 2, DIM, lanes, lane, mask, zero, zero)
    put(ptr, DIM - 1, DIM - 1, DIM, lanes, lane, mask, one, zero)
    if SOURCE:
        put(ptr, 0, 0, DIM, lanes, lane, mask, reach_re, reach_im)
        put(ptr, 0, 1, DIM, lanes, lane, mask, zero, zero)
        put(ptr, 0, 2, DIM, lanes, lane, mask, q_re, q_im)
        put(ptr, 1, 0, DIM, lanes, lane, mask, mixed_re, mixed_im)
        put(ptr, 2, 0, DIM, lanes, lane, mask, zero, zero)


@triton.jit
def causal_adjoint(
    parts, grad, source, hopping, states, dv, dsource, denergy, deta, dhopping,
    sites, lanes, blocks, p_batch, p_site, p_part, p_lane, s_batch, s_site, s_lane,
    d_batch, d_site, d_lane,
    LENGTH: tl.constexpr, SOURCE: tl.constexpr, STARTED: tl.constexpr,
    SITE_ETA: tl.constexpr, SITE_HOPPING: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of every site of a block; those of shared parameters summed over the block."""
    block, tile, batch = program_place(blocks, lanes, BLOCK)
    lane = tile * BLOCK + tl.arange(0, BLOCK)
    mask = lane < lanes
    first = block * LENGTH
    stop = tl.minimum(first + LENGTH, sites)
    origin = first.to(tl.int64)
    hop = load(hopping, lane, mask)
    q_re = tl.zeros([BLOCK], tl.float64)
    q_im, p_re, p_im, sum_re, sum_im, bond = q_re, q_re, q_re, q_re, q_re, q_re
    if STARTED:
        PARTS: tl.constexpr = 4 if SOURCE else 2
        base = states + (batch * blocks + block) * PARTS * lanes
        if SOURCE:
            q_re, q_im = load_pair(base, lane, lanes, mask)
        p_re, p_im = load_pair(base, (PARTS - 2) * lanes + lane, lanes, mask)
    for k in range(0, stop - first):
        i = stop - 1 - k
        far = origin + (i - first)
        row = batch * p_batch + far * p_site + lane * p_lane
        if SITE_HOPPING:
            hop = load(hopping, far * lanes + lane, mask & (i + 1 < sites))
        t = tl.where(i + 1 < sites, hop, 0.0)
        if SITE_HOPPING:
            hop = load(hopping, (far - 1) * lanes + lane, mask & (i > 0))
        before = tl.where(i > 0, hop, 0.0)
        g_re, g_im = load_pair(parts, row, p_part, mask)
        c_re, c_im = load_pair(grad, row, p_part, mask)
        p_re, p_im = c_re + t * t * p_re, -c_im + t * t * p_im
        place = batch * d_batch + far * d_site + lane * d_lane
        if SOURCE:
            old_re, old_im = load_pair(parts, row - p_site + 2 * p_part, p_part, mask & (i > 0))
            b = load(source, batch * s_batch + far * s_site + lane * s_lane, mask)
            d_re, d_im = load_pair(grad, row + 2 * p_part, p_part, mask)
            mu_re, mu_im = d_re + t * q_re, -d_im + t * q_im
            more_re, more_im = multiply(mu_re, mu_im, b + before * old_re, before * old_im)
            p_re, p_im = p_re + more_re, p_im + more_im
            q_re, q_im = multiply(mu_re, mu_im, g_re, g_im)
            store(dsource, place, mask, q_re)
        square_re, square_im = multiply(g_re, g_im, g_re, g_im)
        p_re, p_im = multiply(p_re, p_im, square_re, square_im)
        store(dv, place, mask, -p_re)
        g_re, g_im = load_pair(parts, row - p_site, p_part, mask & (i > 0))
        dt = 2.0 * before * (p_re * g_re - p_im * g_im)
        if SOURCE:
            dt += q_re * old_re - q_im * old_im
        sum_re += p_re
        at = (batch * sites + far) * lanes + lane
        if SITE_ETA:
            store(deta, at, mask, -p_im)
        else:
            sum_im -= p_im
        if SITE_HOPPING:
            store(dhopping, at - (batch + 1) * lanes, mask & (i > 0), dt)
        else:
            bond += tl.where(i > 0, dt, 0.0)
    total = (batch * blocks + block) * lanes + lane
    store(denergy, total, mask, sum_re)
    if not SITE_ETA:
        store(deta, total, mask, sum_im)
    if not SITE_HOPPING:
        store(dhopping, total, mask, bond)


@triton.jit
def two_sided_adjoint_maps(
    v, grad, energy, eta, hopping, left, right, left_maps, right_maps,
    sites, lanes, blocks, v_batch, v_site, v_lane, p_batch, p_site, p_part, p_lane,
    LENGTH: tl.constexpr, SITE_ETA: tl.constexpr, SITE_HOPPING: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """What every block does to T = c + S from its left, and to T' = c + S' from its right."""
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
    base = (batch * blocks + block) * 2 * lanes
    for side in tl.static_range(2):
        # T = sum + reach T_in; near is the g or r of the previous site, on the side it comes from.
        near_re, near_im = load_pair(right + base if side else left + base, lane, lanes, mask)
        sum_re, sum_im, reach_re, reach_im = zero, zero, one, zero
        for k in range(0, stop - first):
            i = stop - 1 - k if side else first + k
            inner = i + 1 < sites if side else i > 0
            far = origin + (i - first)
            if SITE_ETA:
                width = load(eta, far * lanes + lane, mask)
            if SITE_HOPPING:
                hop = load(hopping, (far - 1 + side) * lanes + lane, mask & inner)
            t = tl.where(inner, hop, 0.0)
            step_re, step_im = multiply(t * near_re, t * near_im, t * near_re, t * near_im)
            row = batch * p_batch + far * p_site + lane * p_lane
            c_re, c_im = load_pair(grad, row, p_part, mask)
            sum_re, sum_im = multiply(step_re, step_im, sum_re, sum_im)
            sum_re, sum_im = c_re + sum_re, -c_im + sum_im
            reach_re, reach_im = multiply(step_re, step_im, reach_re, reach_im)
            a_re = load(v, batch * v_batch + far * v_site + lane * v_lane, mask) - e
            a_im = tl.where(mask, -width, -1.0)
            near_re, near_im = reciprocal(a_re - t * t * near_re, a_im - t * t * near_im)
        ptr = (right_maps if side else left_maps) + (batch * blocks + block) * 8 * lanes
        put(ptr, 0, 0, 2, lanes, lane, mask, reach_re, reach_im)
        put(ptr, 0, 1, 2, lanes, lane, mask, sum_re, sum_im)
        put(ptr, 1, 0, 2, lanes, lane, mask, zero, zero)
        put(ptr, 1, 1, 2, lanes, lane, mask, one, zero)


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
    g_im, r_re, r_im, sum_re, sum_im = g_re, g_re, g_re, g_re, g_re
    back_re, back_im, total_re, total_im, bond = g_re, g_re, g_re, g_re, g_re
    if STARTED:
        base = (batch * blocks + block) * 2 * lanes
        g_re, g_im = load_pair(left + base, lane, lanes, mask)
        r_re, r_im = load_pair(right + base, lane, lanes, mask)
        sum_re, sum_im = load_pair(left_sums + base, lane, lanes, mask)
        back_re, back_im = load_pair(right_sums + base, lane, lanes, mask)
    for k in range(0, stop - first):
        i = stop - 1 - k
        far = origin + (i - first)
        if SITE_ETA:
            width = load(eta, far * lanes + lane, mask)
        if SITE_HOPPING:
            hop = load(hopping, far * lanes + lane, mask & (i + 1 < sites))
        t = tl.where(i + 1 < sites, hop, 0.0)
        step_re, step_im = multiply(t * r_re, t * r_im, t * r_re, t * r_im)
        row = batch * p_batch + far * p_site + lane * p_lane
        c_re, c_im = load_pair(grad, row, p_part, mask)
        back_re, back_im = multiply(step_re, step_im, back_re, back_im)
        back_re, back_im = c_re + back_re, -c_im + back_im
        a_re = load(v, batch * v_batch + far * v_site + lane * v_lane, mask) - e
        a_im = tl.where(mask, -width, -1.0)
        r_re, r_im = reciprocal(a_re - t * t * r_re, a_im - t * t * r_im)
        row = batch * r_batch + far * r_site + lane * r_lane
        store_pair(from_right, row, r_part, mask, r_re, r_im)
        store_pair(from_right, row + 2 * r_part, r_part, mask, back_re, back_im)
    tl.debug_barrier()
    row = batch * p_batch + origin * p_site + lane * p_lane
    center_re, center_im = load_pair(parts, row - p_site, p_part, mask & (first > 0))
    for i in range(first, stop):
        far = origin + (i - first)
        if SITE_ETA:
            width = load(eta, far * lanes + lane, mask)
        if SITE_HOPPING:
            hop = load(hopping, (far - 1) * lanes + lane, mask & (i > 0))
        t = tl.where(i > 0, hop, 0.0)
        # G^2 T of the previous site, which reaches this one through r.
        w_re, w_im = multiply(center_re, center_im, center_re, center_im)
        w_re, w_im = multiply(w_re, w_im, sum_re, sum_im)
        row = batch * r_batch + far * r_site + lane * r_lane
        r_re, r_im = load_pair(from_right, row, r_part, mask)
        back_re, back_im = load_pair(from_right, row + 2 * r_part, r_part, mask)
        dt = r_re * w_re - r_im * w_im
        row = batch * p_batch + far * p_site + lane * p_lane
        center_re, center_im = load_pair(parts, row, p_part, mask)
        square_re, square_im = multiply(center_re, center_im, center_re, center_im)
        w_re, w_im = multiply(square_re, square_im, back_re, back_im)
        dt = 2.0 * t * (dt + g_re * w_re - g_im * w_im)
        c_re, c_im = load_pair(grad, row, p_part, mask)
        step_re, step_im = multiply(t * g_re, t * g_im, t * g_re, t * g_im)
        sum_re, sum_im = multiply(step_re, step_im, sum_re, sum_im)
        w_re, w_im = multiply(square_re, square_im, sum_re + back_re, sum_im + back_im)
        sum_re, sum_im = c_re + sum_re, -c_im + sum_im
        a_re = load(v, batch * v_batch + far * v_site + lane * v_lane, mask) - e
        a_im = tl.where(mask, -width, -1.0)
        g_re, g_im = reciprocal(a_re - t * t * g_re, a_im - t * t * g_im)
        store(dv, batch * d_batch + far * d_site + lane * d_lane, mask, -w_re)
        total_re += w_re
        at = (batch * sites + far) * lanes + lane
        if SITE_ETA:
            store(deta, at, mask, -w_im)
        else:
            total_im -= w_im
        if SITE_HOPPING:
            store(dhopping, at - (batch + 1) * lanes, mask & (i > 0), dt)
        else:
            bond += tl.where(i > 0, dt, 0.0)
    total = (batch * blocks + block) * lanes + lane
    store(denergy, total, mask, total_re)
    if not SITE_ETA:
        store(deta, total, mask, total_im)
    if not SITE_HOPPING:
        store(dhopping, total, mask, bond)
