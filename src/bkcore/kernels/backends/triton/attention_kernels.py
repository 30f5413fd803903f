"""Triton kernels of `bkcore.kernels.ops.attention`, which has the formulas, in chunks of sites.

With gates a_i = t_i g_i, a chunk that starts at site s with the incoming state psi_in has

    psi_i = w_i psi_in + sum_{j <= i} X_ij k_j u_j^T
    w_i = a_s ... a_i,     X_ij = a_{j+1} ... a_i g_j

so within a chunk everything is a matrix product, as in other linear attentions (Yang et al., Gated
Linear Attention Transformers with Hardware-Efficient Training, 2023, section 4). Only the states
between chunks are computed one after the other. With M the cotangent that enters a chunk from its
right end e, A_lj = (q_l . k_j)(u_j . c_l) and Y_li = X_li / g_i,

    M_i = sum_{l >= i} Y_li q_l c_l^T + Y_ei M
    <M_i, k_i u_i^T>   = sum_{l >= i} Y_li A_li + Y_ei k_i^T M u_i
    <M_i, psi_{i-1}>   = sum_{l >= i} Y_li (sum_{j < i} X_{i-1,j} A_lj + w_{i-1} q_l^T psi_in c_l)
                         + Y_ei (sum_{j < i} X_{i-1,j} k_j^T M u_j + w_{i-1} <M, psi_in>)

and the rest of the adjoint is that of the sweep of g, with an additional cotangent.
"""

from __future__ import annotations

import triton
import triton.language as tl

from bkcore.kernels.backends.triton.pieces import multiply


@triton.jit
def _product(a_re, a_im, b_re, b_im):
    return multiply(a_re, a_im, b_re, b_im)


@triton.jit
def _dot(a, b):
    return tl.dot(a, b, input_precision="ieee", out_dtype=a.dtype)


@triton.jit
def _gates(hopping, g, chain, site, sites, heads, shift: tl.constexpr):
    """a and g of the sites `site - shift`; 1 and 0 outside the sequence."""
    at = site - shift
    mask = (at >= 0) & (at < sites)
    place = chain + at * heads
    t = tl.load(hopping + place, mask=mask, other=0.0)
    g_re = tl.load(g + 2 * place, mask=mask, other=0.0)
    g_im = tl.load(g + 2 * place + 1, mask=mask, other=0.0)
    return tl.where(mask, t * g_re, 1.0), t * g_im, g_re, g_im


@triton.jit
def _reach(a_re, a_im, CHUNK: tl.constexpr, shift: tl.constexpr):
    """Products a_{j+1} ... a_{i-shift} for j <= i - shift (0 for others), and those from the
    chunk's first site. The gates given are those of the sites i - shift."""
    i = tl.arange(0, CHUNK)[:, None]
    j = tl.arange(0, CHUNK)[None, :]
    if shift == 1:
        first = tl.arange(0, CHUNK) == 0
        a_re, a_im = tl.where(first, 1.0, a_re), tl.where(first, 0.0, a_im)
    past = i - shift > j
    re = tl.where(past, a_re[:, None], 1.0)
    im = tl.where(past, a_im[:, None], 0.0)
    re, im = tl.associative_scan((re, im), 0, _product)
    kept = i - shift >= j
    w_re, w_im = tl.associative_scan((a_re, a_im), 0, _product)
    return tl.where(kept, re, 0.0), tl.where(kept, im, 0.0), w_re, w_im


@triton.jit
def _row(x, at, CHUNK: tl.constexpr):
    """Row `at` of a chunk's matrix, as a vector."""
    return tl.sum(tl.where(tl.arange(0, CHUNK)[:, None] == at, x, 0.0), axis=0)


@triton.jit
def _entry(x, at, CHUNK: tl.constexpr):
    return tl.sum(tl.where(tl.arange(0, CHUNK) == at, x, 0.0), axis=0)


@triton.jit
def _rows(ptr, chain, site, sites, heads, size, PAD: tl.constexpr):
    """(CHUNK, PAD) numbers of a chain: query, key or value."""
    column = tl.arange(0, PAD)[None, :]
    mask = (site[:, None] < sites) & (column < size)
    return tl.load(ptr + (chain + site[:, None] * heads) * size + column, mask=mask, other=0.0)


@triton.jit
def _pair_rows(ptr, chain, site, sites, heads, size, PAD: tl.constexpr):
    """(CHUNK, PAD) complex numbers of a chain, stored as (..., 2, size)."""
    column = tl.arange(0, PAD)[None, :]
    mask = (site[:, None] < sites) & (column < size)
    place = ptr + (chain + site[:, None] * heads) * (2 * size) + column
    return tl.load(place, mask=mask, other=0.0), tl.load(place + size, mask=mask, other=0.0)


@triton.jit
def _store_rows(ptr, chain, site, sites, heads, size, x, PAD: tl.constexpr):
    column = tl.arange(0, PAD)[None, :]
    mask = (site[:, None] < sites) & (column < size)
    tl.store(ptr + (chain + site[:, None] * heads) * size + column, x, mask=mask)


@triton.jit
def _matrix(keys, values, KEYS: tl.constexpr, VALUES: tl.constexpr):
    """Offsets of a state's real parts, and a mask of those that exist."""
    row = tl.arange(0, KEYS)[:, None]
    column = tl.arange(0, VALUES)[None, :]
    return row * values + column, (row < keys) & (column < values)


@triton.jit
def _load_matrix(ptr, place, mask, half):
    return tl.load(ptr + place, mask=mask, other=0.0), tl.load(
        ptr + half + place, mask=mask, other=0.0
    )


@triton.jit
def _store_matrix(ptr, place, mask, half, re, im):
    tl.store(ptr + place, re, mask=mask)
    tl.store(ptr + half + place, im, mask=mask)


@triton.jit
def states(
    hopping, g, key, value, first, checkpoints, last,
    sites, heads, chunks, keys, values,
    STARTED: tl.constexpr, CHUNK: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """psi before every chunk (B, H, chunks, 2, K, U), and after the last (B, H, 2, K, U)."""
    head = tl.program_id(0) % heads
    batch = (tl.program_id(0) // heads).to(tl.int64)
    chain = batch * sites * heads + head
    half = keys * values
    place, mask = _matrix(keys, values, KEYS, VALUES)
    base = batch * heads + head
    psi_re = tl.zeros([KEYS, VALUES], checkpoints.dtype.element_ty)
    psi_im = psi_re
    if STARTED:
        psi_re, psi_im = _load_matrix(first + base * (2 * half), place, mask, half)
    for c in range(0, chunks):
        _store_matrix(
            checkpoints + (base * chunks + c) * (2 * half), place, mask, half, psi_re, psi_im
        )
        site = c * CHUNK + tl.arange(0, CHUNK)
        a_re, a_im, g_re, g_im = _gates(hopping, g, chain, site, sites, heads, 0)
        y_re, y_im, w_re, w_im = _reach(a_re, a_im, CHUNK, 0)
        x_re, x_im = multiply(
            _row(y_re, CHUNK - 1, CHUNK), _row(y_im, CHUNK - 1, CHUNK), g_re, g_im
        )
        k = tl.trans(_rows(key, chain, site, sites, heads, keys, KEYS))
        u = _rows(value, chain, site, sites, heads, values, VALUES)
        by_re, by_im = _entry(w_re, CHUNK - 1, CHUNK), _entry(w_im, CHUNK - 1, CHUNK)
        psi_re, psi_im = multiply(psi_re, psi_im, by_re, by_im)
        psi_re += _dot(k, x_re[:, None] * u)
        psi_im += _dot(k, x_im[:, None] * u)
    _store_matrix(last + base * (2 * half), place, mask, half, psi_re, psi_im)


@triton.jit
def outputs(
    hopping, g, query, key, value, checkpoints, out,
    sites, heads, chunks, keys, values,
    CHUNK: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """q_i^T psi_i of every site of a chunk, (B, N, H, 2, U)."""
    head = tl.program_id(0) % heads
    c = tl.program_id(0) // heads % chunks
    batch = (tl.program_id(0) // (heads * chunks)).to(tl.int64)
    chain = batch * sites * heads + head
    half = keys * values
    place, mask = _matrix(keys, values, KEYS, VALUES)
    base = checkpoints + ((batch * heads + head) * chunks + c) * (2 * half)
    psi_re, psi_im = _load_matrix(base, place, mask, half)
    site = c * CHUNK + tl.arange(0, CHUNK)
    a_re, a_im, g_re, g_im = _gates(hopping, g, chain, site, sites, heads, 0)
    y_re, y_im, w_re, w_im = _reach(a_re, a_im, CHUNK, 0)
    x_re, x_im = multiply(y_re, y_im, g_re[None, :], g_im[None, :])
    q = _rows(query, chain, site, sites, heads, keys, KEYS)
    k = _rows(key, chain, site, sites, heads, keys, KEYS)
    u = _rows(value, chain, site, sites, heads, values, VALUES)
    weight = _dot(q, tl.trans(k))
    re, im = multiply(_dot(q, psi_re), _dot(q, psi_im), w_re[:, None], w_im[:, None])
    re += _dot(weight * x_re, u)
    im += _dot(weight * x_im, u)
    column = tl.arange(0, VALUES)[None, :]
    kept = (site[:, None] < sites) & (column < values)
    at = out + (chain + site[:, None] * heads) * (2 * values) + column
    tl.store(at, re, mask=kept)
    tl.store(at + values, im, mask=kept)


@triton.jit
def adjoint_states(
    hopping, g, query, dout, dlast, entering, dfirst,
    sites, heads, chunks, keys, values,
    CHUNK: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """The M that enters every chunk from the right, and the gradient of the first psi."""
    head = tl.program_id(0) % heads
    batch = (tl.program_id(0) // heads).to(tl.int64)
    chain = batch * sites * heads + head
    half = keys * values
    place, mask = _matrix(keys, values, KEYS, VALUES)
    base = batch * heads + head
    m_re, m_im = _load_matrix(dlast + base * (2 * half), place, mask, half)
    m_im = -m_im
    for r in range(0, chunks):
        c = chunks - 1 - r
        _store_matrix(entering + (base * chunks + c) * (2 * half), place, mask, half, m_re, m_im)
        site = c * CHUNK + tl.arange(0, CHUNK)
        a_re, a_im, _g_re, _g_im = _gates(hopping, g, chain, site, sites, heads, 0)
        w_re, w_im = tl.associative_scan((a_re, a_im), 0, _product)
        q = tl.trans(_rows(query, chain, site, sites, heads, keys, KEYS))
        c_re, c_im = _pair_rows(dout, chain, site, sites, heads, values, VALUES)
        c_re, c_im = multiply(c_re, -c_im, w_re[:, None], w_im[:, None])
        by_re, by_im = _entry(w_re, CHUNK - 1, CHUNK), _entry(w_im, CHUNK - 1, CHUNK)
        m_re, m_im = multiply(m_re, m_im, by_re, by_im)
        m_re += _dot(q, c_re)
        m_im += _dot(q, c_im)
    _store_matrix(dfirst + base * (2 * half), place, mask, half, m_re, -m_im)


@triton.jit
def adjoint(
    hopping, g, query, key, value, dout, checkpoints, entering,
    dquery, dkey, dvalue, local, moved,
    sites, heads, chunks, keys, values,
    CHUNK: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """Gradients of query, key and value, and <M_i, k_i u_i^T> and <M_i, psi_{i-1}>, of a chunk."""
    head = tl.program_id(0) % heads
    c = tl.program_id(0) // heads % chunks
    batch = (tl.program_id(0) // (heads * chunks)).to(tl.int64)
    chain = batch * sites * heads + head
    half = keys * values
    place, mask = _matrix(keys, values, KEYS, VALUES)
    base = ((batch * heads + head) * chunks + c) * (2 * half)
    psi_re, psi_im = _load_matrix(checkpoints + base, place, mask, half)
    m_re, m_im = _load_matrix(entering + base, place, mask, half)
    site = c * CHUNK + tl.arange(0, CHUNK)
    a_re, a_im, g_re, g_im = _gates(hopping, g, chain, site, sites, heads, 0)
    y_re, y_im, w_re, w_im = _reach(a_re, a_im, CHUNK, 0)
    x_re, x_im = multiply(y_re, y_im, g_re[None, :], g_im[None, :])
    end_re, end_im = _row(y_re, CHUNK - 1, CHUNK), _row(y_im, CHUNK - 1, CHUNK)
    last_re, last_im = multiply(end_re, end_im, g_re, g_im)
    q = _rows(query, chain, site, sites, heads, keys, KEYS)
    k = _rows(key, chain, site, sites, heads, keys, KEYS)
    u = _rows(value, chain, site, sites, heads, values, VALUES)
    c_re, c_im = _pair_rows(dout, chain, site, sites, heads, values, VALUES)
    c_im = -c_im
    weight = _dot(q, tl.trans(k))
    gram_re, gram_im = _dot(c_re, tl.trans(u)), _dot(c_im, tl.trans(u))

    # dq_i = Re(psi_i c_i)
    mixed_re, _mixed_im = multiply(x_re, x_im, gram_re, gram_im)
    read_re = _dot(c_re, tl.trans(psi_re)) - _dot(c_im, tl.trans(psi_im))
    read_im = _dot(c_re, tl.trans(psi_im)) + _dot(c_im, tl.trans(psi_re))
    dq = w_re[:, None] * read_re - w_im[:, None] * read_im + _dot(mixed_re, k)
    _store_rows(dquery, chain, site, sites, heads, keys, dq, KEYS)

    # dk_j = Re(g_j M_j u_j)
    um_re, um_im = _dot(u, tl.trans(m_re)), _dot(u, tl.trans(m_im))
    dk = _dot(tl.trans(mixed_re), q) + last_re[:, None] * um_re - last_im[:, None] * um_im
    _store_rows(dkey, chain, site, sites, heads, keys, dk, KEYS)

    # du_j = Re(g_j M_j^T k_j)
    km_re, km_im = _dot(k, m_re), _dot(k, m_im)
    du = _dot(tl.trans(weight * x_re), c_re) - _dot(tl.trans(weight * x_im), c_im)
    du += last_re[:, None] * km_re - last_im[:, None] * km_im
    _store_rows(dvalue, chain, site, sites, heads, values, du, VALUES)

    # <M_i, k_i u_i^T>
    a_lj_re, a_lj_im = weight * gram_re, weight * gram_im
    z_re, z_im = multiply(y_re, y_im, a_lj_re, a_lj_im)
    f_re, f_im = tl.sum(km_re * u, axis=1), tl.sum(km_im * u, axis=1)
    far_re, far_im = multiply(end_re, end_im, f_re, f_im)
    z_re, z_im = tl.sum(z_re, axis=0) + far_re, tl.sum(z_im, axis=0) + far_im

    # <M_i, psi_{i-1}>
    b_re, b_im, _old_re, _old_im = _gates(hopping, g, chain, site, sites, heads, 1)
    s_re, s_im, ws_re, ws_im = _reach(b_re, b_im, CHUNK, 1)
    xs_re, xs_im = multiply(s_re, s_im, g_re[None, :], g_im[None, :])
    e_re, e_im = tl.sum(read_re * q, axis=1), tl.sum(read_im * q, axis=1)
    sum_re = _dot(a_lj_re, tl.trans(xs_re)) - _dot(a_lj_im, tl.trans(xs_im))
    sum_im = _dot(a_lj_re, tl.trans(xs_im)) + _dot(a_lj_im, tl.trans(xs_re))
    more_re, more_im = multiply(e_re[:, None], e_im[:, None], ws_re[None, :], ws_im[None, :])
    v_re, v_im = multiply(y_re, y_im, sum_re + more_re, sum_im + more_im)
    mp_re, mp_im = multiply(m_re, m_im, psi_re, psi_im)
    inner_re = tl.sum(tl.sum(mp_re, axis=1), axis=0)
    inner_im = tl.sum(tl.sum(mp_im, axis=1), axis=0)
    back_re, back_im = multiply(ws_re, ws_im, inner_re, inner_im)
    part_re, part_im = multiply(xs_re, xs_im, f_re[None, :], f_im[None, :])
    back_re += tl.sum(part_re, axis=1)
    back_im += tl.sum(part_im, axis=1)
    far_re, far_im = multiply(end_re, end_im, back_re, back_im)
    v_re, v_im = tl.sum(v_re, axis=0) + far_re, tl.sum(v_im, axis=0) + far_im

    kept = site < sites
    at = 2 * (chain + site * heads)
    tl.store(local + at, z_re, mask=kept)
    tl.store(local + at + 1, z_im, mask=kept)
    tl.store(moved + at, v_re, mask=kept)
    tl.store(moved + at + 1, v_im, mask=kept)
