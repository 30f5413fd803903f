"""The sweep in plain PyTorch: any device, float32 and float64, one step of Python per site.

It is the readable definition that the native kernels are compared with, and it is slow. The
formulas and their derivation are in `bkcore.kernels.ops`. Complex tensors stay inside.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bkcore.kernels.backend import (
    ATTENTION_CHUNK,
    Backend,
    Gradients,
    SweepFunction,
    empty_like_sites,
    empty_parts,
    ordered_sum,
)
from bkcore.kernels.weight_levels import nearest_codes, saturates, to_levels


def sweep(
    v: Tensor,
    source: Tensor | None,
    energy: Tensor,
    eta: Tensor,
    hopping: Tensor,
    two_sided: bool,
) -> Tensor:
    diagonal = torch.complex(v - energy, (-eta).expand_as(v))
    t = _bonds(hopping, v.shape[1])
    left = _left_connected(diagonal, t)
    if two_sided:
        values = [_two_sided(diagonal, t, left, _right_connected(diagonal, t))]
    elif source is None:
        values = [left]
    else:
        values = [left, _propagate(left, source, t)]
    components = [x for value in values for x in (value.real, value.imag)]
    return empty_parts(v, len(components)).copy_(torch.stack(components, 2))


def sweep_backward(
    grad: Tensor,
    parts: Tensor,
    v: Tensor | None,
    source: Tensor | None,
    energy: Tensor,
    eta: Tensor,
    hopping: Tensor,
    two_sided: bool,
) -> Gradients:
    t = _bonds(hopping, parts.shape[1])
    dsource: Tensor | None = None
    if two_sided:
        assert v is not None
        diagonal = torch.complex(v - energy, (-eta).expand_as(v))
        site, bond = _two_sided_adjoint(diagonal, t, _join(parts, 0), _cotangent(grad, 0))
    else:
        site, bond, dsource = _causal_adjoint(parts, grad, source, t)
    return (
        empty_like_sites(parts).copy_(-site.real),
        None if dsource is None else empty_like_sites(parts).copy_(dsource),
        ordered_sum(site.real.flatten(0, 1)),
        _fold(-site.imag, eta.shape[0]),
        _fold(bond, hopping.shape[0]),
    )


def sweep_codes(
    v: Tensor,
    source: Tensor | None,
    energy: Tensor,
    eta: Tensor,
    hopping: Tensor,
    in_scale: Tensor,
    in_zero: Tensor,
    out_scale: Tensor,
    out_zero: Tensor,
    in_levels: Tensor | None,
    out_bounds: Tensor | None,
    bits: int,
    two_sided: bool,
) -> Tensor:
    lanes = energy.shape[0]
    low = -(1 << (bits - 1))

    def decode(codes: Tensor, n: int) -> Tensor:
        unpacked = _bytes(codes, lanes, bits)
        level = unpacked if in_levels is None else in_levels[n][unpacked.long() - low]
        return in_scale[n] * (level - in_zero[n])

    inputs = [decode(codes, n) for n, codes in enumerate((v, source)) if codes is not None]
    parts = sweep(
        inputs[0], inputs[1] if source is not None else None, energy, eta, hopping, two_sided
    )
    ratio, zero = parts / out_scale.transpose(0, 1), out_zero.transpose(0, 1)
    if out_bounds is None:
        rounded = (torch.round(ratio) + zero).clamp(low, -low - 1)
    else:
        pairs = zip((ratio + zero).unbind(2), out_bounds, strict=True)
        found = [
            torch.where(x.isnan(), 0, torch.bucketize(x.contiguous(), bounds))
            for x, bounds in pairs
        ]
        rounded = (torch.stack(found, 2) + low).float()
    codes = torch.nan_to_num(rounded, nan=low).to(torch.int8)
    if bits == 8:
        return codes
    nibbles = torch.nn.functional.pad(codes, (0, lanes % 2)).view(torch.uint8) & 0xF
    return nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)


def sweep_rounded(
    v: Tensor,
    energy: Tensor,
    eta: Tensor,
    hopping: Tensor,
    scale: Tensor,
    zero: Tensor,
    levels: Tensor | None,
    bounds: Tensor | None,
    group_size: int,
    bits: int,
    two_sided: bool,
    sweep: SweepFunction = sweep,
) -> Tensor:
    def rounded(x: Tensor, part: int) -> Tensor:
        table = None if levels is None or bounds is None else (levels[part], bounds[part])
        return round_sites(x, scale[part], zero[part], table, group_size, bits)

    parts = sweep(rounded(v, 0), None, energy, eta, hopping, two_sided)
    return empty_parts(v, 2).copy_(
        torch.stack([rounded(parts[:, :, c], 1 + c) for c in range(2)], 2)
    )


def round_sites(
    x: Tensor,
    scale: Tensor,
    zero: Tensor,
    table: tuple[Tensor, Tensor] | None,
    group_size: int,
    bits: int,
) -> Tensor:
    """x (B, N, H) rounded by the scales (G,) and zero points (G,) of its sites; the table holds
    levels and the bounds between them."""
    half = 1 << (bits - 1)
    group = torch.arange(x.shape[1], device=x.device) // group_size
    step, offset = scale[group, None], zero[group, None]
    if table is None:
        level = (torch.round(x / step) + offset).clamp(-half, half - 1)
    else:
        levels, bounds = table
        place = torch.bucketize((x / step + offset).contiguous(), bounds)
        level = torch.where(x.isnan(), x, levels[place.clamp(max=2 * half - 1)])
    return step * (level - offset)


def step(
    state: Tensor,
    v: Tensor,
    source: Tensor | None,
    energy: Tensor,
    eta: Tensor,
    hopping: Tensor,
) -> None:
    before = torch.complex(state[:, 0], state[:, 1])
    g = 1 / (torch.complex(v - energy, (-eta).expand_as(v)) - hopping.square() * before)
    values = [g.real, g.imag]
    if source is not None:
        psi = g * (source + hopping * torch.complex(state[:, 2], state[:, 3]))
        values += [psi.real, psi.imag]
    state.copy_(torch.stack(values, 1))


def product(x: Tensor, weight: Tensor, scales: Tensor, group_size: int, bits: int) -> Tensor:
    codes, row_scale = quantize_rows(x.flatten(0, -2) if x.ndim > 1 else x[None])
    weight_codes = _bytes(weight, x.shape[-1], bits)
    if bits == 4:
        weight_codes = to_levels(weight_codes)
    out = integer_product(codes, row_scale, weight_codes, scales.float(), group_size)
    return out.view(*x.shape[:-1], len(weight))


def round_channels(
    x: Tensor,
    scale: Tensor,
    zero: Tensor,
    levels: Tensor | None,
    group_size: int,
    bits: int,
) -> Tensor:
    channels = torch.arange(x.shape[-1], device=x.device) // group_size
    s, z = scale.float()[channels], zero[channels]
    if levels is not None:
        level = levels[torch.bucketize(x / s + z, levels[:-1] + levels.diff() / 2)]
        return torch.where(x.isnan(), x, s * (level - z))
    low = -(1 << (bits - 1))
    return s * (((x / s).round() + z).clamp(low, -low - 1) - z)


def round_channels_backward(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    zero: Tensor,
    levels: Tensor | None,
    group_size: int,
    bits: int,
) -> tuple[Tensor, Tensor, Tensor | None]:
    channels = torch.arange(x.shape[-1], device=x.device) // group_size
    s, z = scale.float()[channels], zero[channels]
    ratio, low = x / s, -(1 << (bits - 1))
    by_levels = None
    if levels is None:
        code = ratio.round() + z
        outside = (code < low) | (code > -low - 1)
        level = code.clamp(low, -low - 1)
    else:
        place = ratio + z
        index = torch.bucketize(place, levels[:-1] + levels.diff() / 2)
        index = torch.where(place.isnan(), 0, index)
        outside, level = (place < levels[0]) | (place > levels[-1]), levels[index]
        by_levels = torch.zeros_like(levels).index_add_(0, index.flatten(), (grad * s).flatten())
    moved = level - z - ratio.masked_fill(outside, 0)
    return grad.masked_fill(outside, 0), (grad * moved).flatten(0, -2).sum(0), by_levels


def round_weight(
    weight: Tensor, scale: Tensor, group_size: int, bits: int
) -> tuple[Tensor, Tensor]:
    each = _each_column(scale.float(), group_size, weight)
    codes = nearest_codes(weight / each, bits)
    return torch.nan_to_num(codes).to(torch.int8), torch.where(weight.isnan(), weight, each * codes)


def round_weight_backward(
    grad: Tensor, weight: Tensor, scale: Tensor, group_size: int, bits: int
) -> tuple[Tensor, Tensor]:
    ratio = weight / _each_column(scale.float(), group_size, weight)
    outside = saturates(ratio, bits)
    by_scale = grad * (nearest_codes(ratio, bits) - ratio.masked_fill(outside, 0))
    padding = -weight.shape[1] % group_size
    grouped = torch.nn.functional.pad(by_scale, (0, padding)).unflatten(1, (-1, group_size))
    return grad.masked_fill(outside, 0), grouped.sum(-1)


def _each_column(scale: Tensor, group_size: int, weight: Tensor) -> Tensor:
    return scale.repeat_interleave(group_size, 1)[:, : weight.shape[1]]


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """INT8 codes (M, K) and float32 scales (M, 1) of the rows of x; see `product.py`."""
    scale = x.abs().amax(-1, keepdim=True) / 127
    scale = torch.where(scale < torch.finfo(torch.float32).tiny, 1.0, scale)
    # The quotient is at most 127 up to rounding, so there is nothing to clamp.
    return torch.where(scale.isfinite(), x / scale, 0.0).round_().to(torch.int8), scale


def round_rows(x: Tensor) -> Tensor:
    codes, scale = quantize_rows(x)
    return codes * scale


def integer_product(
    codes: Tensor, row_scale: Tensor, weight_codes: Tensor, weight_scales: Tensor, group_size: int
) -> Tensor:
    """Products of codes, rescaled in the order of roundings of `bkcore.kernels.product`.

    Args:
        codes, row_scale: int8 (M, K) and float32 (M, 1), from `quantize_rows`.
        weight_codes, weight_scales: int8 (O, K) and float32 (O, G).
        group_size: inputs that share a weight scale.

    Returns:
        float32 (M, O).
    """
    if codes.shape[1] == 1:  # torch._int_mm reads beyond a matrix of one column (2.13)
        codes, weight_codes = (torch.nn.functional.pad(x, (0, 1)) for x in (codes, weight_codes))
    total: Tensor | None = None
    for group, scale in enumerate(weight_scales.unbind(1)):
        columns = slice(group * group_size, (group + 1) * group_size)
        sums = torch._int_mm(codes[:, columns], weight_codes[:, columns].t())
        term = sums * scale
        total = term if total is None else total.add_(term)
    assert total is not None
    return total.mul_(row_scale)


def _bytes(codes: Tensor, lanes: int, bits: int) -> Tensor:
    if bits == 8:
        return codes
    signed = codes.view(torch.int8)
    return torch.stack(((signed << 4) >> 4, signed >> 4), -1).flatten(-2)[..., :lanes]


def _bonds(hopping: Tensor, sites: int) -> Tensor:
    """Hopping with one row per site: row i couples sites i and i + 1, and the last row is 0."""
    return torch.cat((hopping.expand(sites - 1, -1), hopping.new_zeros(1, hopping.shape[1])))


def _left_connected(diagonal: Tensor, t: Tensor) -> Tensor:
    rows = [1 / diagonal[:, 0]]
    for i in range(1, diagonal.shape[1]):
        rows.append(1 / (diagonal[:, i] - t[i - 1].square() * rows[-1]))
    return torch.stack(rows, 1)


def _right_connected(diagonal: Tensor, t: Tensor) -> Tensor:
    rows = [1 / diagonal[:, -1]]
    for i in range(diagonal.shape[1] - 2, -1, -1):
        rows.append(1 / (diagonal[:, i] - t[i].square() * rows[-1]))
    return torch.stack(rows[::-1], 1)


def _two_sided(diagonal: Tensor, t: Tensor, left: Tensor, right: Tensor) -> Tensor:
    inverse = diagonal.clone()
    inverse[:, 1:] -= t[:-1].square() * left[:, :-1]
    inverse[:, :-1] -= t[:-1].square() * right[:, 1:]
    return 1 / inverse


def _propagate(left: Tensor, source: Tensor, t: Tensor) -> Tensor:
    rows = [left[:, 0] * source[:, 0]]
    for i in range(1, left.shape[1]):
        rows.append(left[:, i] * (source[:, i] + t[i - 1] * rows[-1]))
    return torch.stack(rows, 1)


def _causal_adjoint(
    parts: Tensor, grad: Tensor, source: Tensor | None, t: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """P_i for every site, the gradient of every bond, and the gradient of the source."""
    g, c_g = _join(parts, 0), _cotangent(grad, 0)
    bond = g.real.new_zeros(g.shape[0], g.shape[1] - 1, g.shape[2])
    dsource = None
    if source is not None:
        psi, c_psi = _join(parts, 2), _cotangent(grad, 2)
        mu = _accumulate(c_psi, t * torch.ones_like(g), g)
        driven = source + _after(t * psi)
        c_g = c_g + mu * driven
        dsource = (mu * g).real
        bond = bond + ((mu * g)[:, 1:] * psi[:, :-1]).real
    site = _accumulate(c_g, t.square() * torch.ones_like(g), g.square()) * g.square()
    bond = bond + 2 * t[:-1] * (site[:, 1:] * g[:, :-1]).real
    return site, bond, dsource


def _two_sided_adjoint(
    diagonal: Tensor, t: Tensor, center: Tensor, c: Tensor
) -> tuple[Tensor, Tensor]:
    """W_j for every site and the gradient of every bond."""
    left, right = _left_connected(diagonal, t), _right_connected(diagonal, t)
    from_left, from_right = torch.zeros_like(c), torch.zeros_like(c)
    for j in range(1, c.shape[1]):
        hop = (t[j - 1] * left[:, j - 1]).square()
        from_left[:, j] = hop * (from_left[:, j - 1] + c[:, j - 1])
    for j in range(c.shape[1] - 2, -1, -1):
        hop = (t[j] * right[:, j + 1]).square()
        from_right[:, j] = hop * (from_right[:, j + 1] + c[:, j + 1])
    weight = center.square()
    towards_right = (right[:, 1:] * (weight * (c + from_left))[:, :-1]).real
    towards_left = (left[:, :-1] * (weight * (c + from_right))[:, 1:]).real
    bond = 2 * t[:-1] * (towards_right + towards_left)
    return weight * (c + from_left + from_right), bond


def _accumulate(term: Tensor, step: Tensor, factor: Tensor) -> Tensor:
    """x_i = term_i + step_i * factor_{i+1} * x_{i+1}, from the last site to the first."""
    rows = [term[:, -1]]
    for i in range(term.shape[1] - 2, -1, -1):
        rows.append(term[:, i] + step[:, i] * factor[:, i + 1] * rows[-1])
    return torch.stack(rows[::-1], 1)


def _after(x: Tensor) -> Tensor:
    """x moved one site to the right; the first site becomes 0."""
    return torch.cat((torch.zeros_like(x[:, :1]), x[:, :-1]), 1)


def _join(parts: Tensor, first: int) -> Tensor:
    return torch.complex(parts[:, :, first], parts[:, :, first + 1])


def _cotangent(grad: Tensor, first: int) -> Tensor:
    """dL/dRe - i dL/dIm, negated in memory: a lazily conjugated tensor is misread when the
    operator is called from a compiled graph."""
    return torch.complex(grad[:, :, first], -grad[:, :, first + 1])


def _fold(per_site: Tensor, rows: int) -> Tensor:
    """Sum (B, M, H) over the batch, and over M too for a parameter that all sites share."""
    if rows == per_site.shape[1]:
        return ordered_sum(per_site)
    return ordered_sum(per_site.flatten(0, 1)).unsqueeze(0)


def attention(
    v: Tensor,
    hopping: Tensor,
    energy: Tensor,
    eta: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    first_g: Tensor | None,
    first_psi: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, sites, heads = v.shape
    diagonal = torch.complex(v - energy, (-eta).expand_as(v))
    g = _first(first_g, diagonal.new_zeros(batch, heads), -1)
    psi = _first(first_psi, diagonal.new_zeros(batch, heads, query.shape[3], value.shape[3]), 2)
    all_g, outs, kept = [], [], []
    for i in range(sites):
        if keep and i % ATTENTION_CHUNK == 0:
            kept.append(psi)
        g = 1 / (diagonal[:, i] - hopping[:, i] ** 2 * g)
        psi = _attention_step(g, hopping[:, i], key[:, i], value[:, i], psi)
        all_g.append(g)
        outs.append((query[:, i, :, :, None] * psi).sum(2))
    checkpoints = torch.stack(kept, 2) if keep else psi[:, :, None][:, :, :0]
    return (
        _split(torch.stack(all_g, 1), 3),
        _split(torch.stack(outs, 1), 3),
        _split(psi, 2),
        _split(checkpoints, 3),
    )


def attention_backward(
    dg: Tensor,
    dout: Tensor,
    dpsi: Tensor,
    v: Tensor,
    hopping: Tensor,
    energy: Tensor,
    eta: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    first_g: Tensor | None,
    g: Tensor,
    checkpoints: Tensor,
) -> tuple[Tensor, ...]:
    c_g, c_out = _complex(dg, 3).conj(), _complex(dout, 3).conj()
    m, carry = _complex(dpsi, 2).conj(), torch.zeros_like(c_g[:, 0])
    all_g = _complex(g, 3)
    first = _first(first_g, torch.zeros_like(carry), -1)
    before_g = torch.cat((first[:, None], all_g[:, :-1]), 1)
    psis = _attention_states(all_g, hopping, key, value, _complex(checkpoints, 3))
    rows: list[tuple[Tensor, ...]] = []
    for i in range(v.shape[1] - 1, -1, -1):
        t, q, k, u = hopping[:, i], query[:, i], key[:, i], value[:, i]
        m = m + q[..., None] * c_out[:, i, :, None, :]
        moved = (m * psis[i]).sum((-2, -1))
        moment = (m * u[..., None, :]).sum(-1)
        column = (m * k[..., None]).sum(-2)
        site = all_g[:, i]
        p = (c_g[:, i] + (moment * k).sum(-1) + t * moved + carry) * site**2
        dt = (site * moved + 2 * t * p * before_g[:, i]).real
        dq = (psis[i + 1] * c_out[:, i, :, None, :]).sum(-1).real
        scale = site[..., None]
        rows.append((p, dt, dq, (scale * moment).real, (scale * column).real))
        carry, m = t**2 * p, (t * site)[..., None, None] * m
    p, dt, dq, dk, du = (torch.stack(row[::-1], 1) for row in zip(*rows, strict=True))
    denergy, deta = p.real.sum(1), -p.imag.sum(1)
    return (
        -p.real,
        dt,
        ordered_sum(denergy),
        ordered_sum(deta),
        dq,
        dk,
        du,
        torch.view_as_real(carry.conj().resolve_conj()),
        _split(m.conj(), 2),
    )


def _attention_step(g: Tensor, t: Tensor, key: Tensor, value: Tensor, psi: Tensor) -> Tensor:
    source = key[..., :, None] * value[..., None, :]
    return g[..., None, None] * (source + t[..., None, None] * psi)


def _attention_states(
    g: Tensor, hopping: Tensor, key: Tensor, value: Tensor, checkpoints: Tensor
) -> list[Tensor]:
    """psi before every site, and after the last."""
    states = []
    for i in range(g.shape[1]):
        if i % ATTENTION_CHUNK == 0:
            psi = checkpoints[:, :, i // ATTENTION_CHUNK]
        states.append(psi)
        psi = _attention_step(g[:, i], hopping[:, i], key[:, i], value[:, i], psi)
    return [*states, psi]


def _complex(parts: Tensor, dim: int) -> Tensor:
    real, imag = parts.unbind(dim)
    return torch.complex(real, imag)


def _split(x: Tensor, dim: int) -> Tensor:
    return torch.stack((x.real, x.imag), dim)


def _first(parts: Tensor | None, zeros: Tensor, dim: int) -> Tensor:
    return zeros if parts is None else _complex(parts, dim)


BACKEND = Backend(
    name="reference",
    absent=lambda: None,
    refuses=lambda v: None,
    describe=lambda: (None, None),
    sweep=sweep,
    sweep_backward=sweep_backward,
    sweep_codes=sweep_codes,
    sweep_rounded=sweep_rounded,
    product=product,
    round_channels=round_channels,
    round_channels_backward=round_channels_backward,
    round_rows=round_rows,
    round_weight=round_weight,
    round_weight_backward=round_weight_backward,
    step=step,
    attention=attention,
    attention_backward=attention_backward,
)
