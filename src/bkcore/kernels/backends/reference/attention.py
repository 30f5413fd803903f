"""Resolvent attention in plain PyTorch, one Python step per site."""

from __future__ import annotations

import torch
from torch import Tensor

from bkcore.kernels.backends.interface import (
    ATTENTION_CHUNK,
    Attention,
    AttentionBackward,
    AttentionGradients,
    AttentionResults,
    ordered_sum,
)


def attention(args: Attention) -> AttentionResults:
    v, hopping, key, value = args.v, args.hopping, args.key, args.value
    batch, sites, heads = v.shape
    diagonal = torch.complex(v - args.energy, (-args.eta).expand_as(v))
    g = _first(args.first_g, diagonal.new_zeros(batch, heads), -1)
    zeros = diagonal.new_zeros(batch, heads, key.shape[3], value.shape[3])
    psi = _first(args.first_psi, zeros, 2)
    all_g, outs, kept = [], [], []
    for i in range(sites):
        if args.keep and i % ATTENTION_CHUNK == 0:
            kept.append(psi)
        g = 1 / (diagonal[:, i] - hopping[:, i] ** 2 * g)
        psi = _attention_step(g, hopping[:, i], key[:, i], value[:, i], psi)
        all_g.append(g)
        outs.append((args.query[:, i, :, :, None] * psi).sum(2))
    checkpoints = torch.stack(kept, 2) if args.keep else psi[:, :, None][:, :, :0]
    return AttentionResults(
        _split(torch.stack(all_g, 1), 3),
        _split(torch.stack(outs, 1), 3),
        _split(psi, 2),
        _split(checkpoints, 3),
    )


def attention_backward(args: AttentionBackward) -> AttentionGradients:
    c_g, c_out = _complex(args.dg, 3).conj(), _complex(args.dout, 3).conj()
    m, carry = _complex(args.dpsi, 2).conj(), torch.zeros_like(c_g[:, 0])
    all_g = _complex(args.g, 3)
    first = _first(args.first_g, torch.zeros_like(carry), -1)
    before_g = torch.cat((first[:, None], all_g[:, :-1]), 1)
    psis = _attention_states(all_g, args)
    rows: list[tuple[Tensor, ...]] = []
    for i in range(args.v.shape[1] - 1, -1, -1):
        t, q = args.hopping[:, i], args.query[:, i]
        k, u = args.key[:, i], args.value[:, i]
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
    return AttentionGradients(
        v=-p.real,
        hopping=dt,
        energy=ordered_sum(denergy),
        eta=ordered_sum(deta),
        query=dq,
        key=dk,
        value=du,
        first_g=torch.view_as_real(carry.conj().resolve_conj()),
        first_psi=_split(m.conj(), 2),
    )


def _attention_states(g: Tensor, args: AttentionBackward) -> list[Tensor]:
    """psi before every site, and after the last."""
    checkpoints, states = _complex(args.checkpoints, 3), []
    for i in range(g.shape[1]):
        if i % ATTENTION_CHUNK == 0:
            psi = checkpoints[:, :, i // ATTENTION_CHUNK]
        states.append(psi)
        psi = _attention_step(g[:, i], args.hopping[:, i], args.key[:, i], args.value[:, i], psi)
    return [*states, psi]


def _attention_step(g: Tensor, t: Tensor, key: Tensor, value: Tensor, psi: Tensor) -> Tensor:
    source = key[..., :, None] * value[..., None, :]
    return g[..., None, None] * (source + t[..., None, None] * psi)


def _complex(parts: Tensor, dim: int) -> Tensor:
    real, imag = parts.unbind(dim)
    return torch.complex(real, imag)


def _split(x: Tensor, dim: int) -> Tensor:
    return torch.stack((x.real, x.imag), dim)


def _first(parts: Tensor | None, zeros: Tensor, dim: int) -> Tensor:
    return zeros if parts is None else _complex(parts, dim)
