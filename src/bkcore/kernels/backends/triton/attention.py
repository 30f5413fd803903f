"""Resolvent attention on a GPU: the host side of `attention_kernels`."""

from __future__ import annotations

import torch
from torch import Tensor

from bkcore.kernels.backends.interface import (
    ATTENTION_CHUNK,
    Attention,
    AttentionBackward,
    AttentionGradients,
    AttentionResults,
    Sweep,
    SweepBackward,
    attention_chunks,
    attention_shapes,
    ordered_sum,
)
from bkcore.kernels.backends.triton.launch import kernels, on
from bkcore.kernels.backends.triton.sweep import sweep, sweep_backward


def attention(args: Attention) -> AttentionResults:
    v, query, key, value = args.v, args.query, args.key, args.value
    sizes, tiles = _sizes(args)
    batch, sites, heads, _ = query.shape
    parts = sweep(_chains(args))
    g = parts.view(sites, 2, batch, heads).permute(2, 0, 3, 1).contiguous()
    _, *shapes = attention_shapes(args._replace(keep=True))
    out, psi, checkpoints = (v.new_empty(shape) for shape in shapes)
    chain = (args.hopping, g)
    first = psi if args.first_psi is None else args.first_psi
    if batch * heads:
        with on(v.device):
            kernels("attention").states[(batch * heads,)](
                *(*chain, key, value, first, checkpoints, psi, *sizes),
                STARTED=args.first_psi is not None,
                **tiles,
            )
            kernels("attention").outputs[(batch * heads * sizes[2],)](
                *(*chain, query, key, value, checkpoints, out, *sizes), **tiles
            )
    return AttentionResults(g, out, psi, checkpoints if args.keep else checkpoints[:, :, :0])


def attention_backward(args: AttentionBackward) -> AttentionGradients:
    query, key, value = args.query, args.key, args.value
    hopping, g, dout, checkpoints = args.hopping, args.g, args.dout, args.checkpoints
    sizes, tiles = _sizes(args)
    batch, _, heads, _ = query.shape
    entering, dfirst_psi = torch.empty_like(checkpoints), torch.empty_like(args.dpsi)
    dquery, dkey, dvalue = (torch.empty_like(x) for x in (query, key, value))
    local, moved = torch.empty_like(g), torch.empty_like(g)
    if batch * heads:
        with on(args.v.device):
            kernels("attention").adjoint_states[(batch * heads,)](
                *(hopping, g, query, dout, args.dpsi, entering, dfirst_psi, *sizes), **tiles
            )
            kernels("attention").adjoint[(batch * heads * sizes[2],)](
                *(hopping, g, query, key, value, dout, checkpoints, entering),
                *(dquery, dkey, dvalue, local, moved, *sizes),
                **tiles,
            )
    dv, deta, dhopping = _adjoint_of_g(args, local, moved)
    p = torch.stack((-dv, -deta), -1)
    first = hopping[:, 0, :, None] * p[:, 0]
    if args.first_g is not None:
        before = args.first_g
        dhopping[:, 0] += 2 * (first[..., 0] * before[..., 0] - first[..., 1] * before[..., 1])
    dfirst_g = hopping[:, 0, :, None] * first * first.new_tensor([1, -1])
    denergy, deta = (ordered_sum(x.flatten(0, 1)) for x in (p[..., 0], -p[..., 1]))
    chains = dv, dhopping, denergy, deta
    return AttentionGradients(*chains, dquery, dkey, dvalue, dfirst_g, dfirst_psi)


def _adjoint_of_g(
    args: AttentionBackward, local: Tensor, moved: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients (B, N, H) of v, of eta at every site, and of the hopping, without the part of what
    enters the first site."""
    hopping, g, dg = args.hopping, args.g, args.dg
    batch, sites, heads = hopping.shape
    # c^g + <M, w>, conjugated as gradients are.
    drive = local + hopping[..., None] * moved
    grad = torch.stack((dg[..., 0] + drive[..., 0], dg[..., 1] - drive[..., 1]), -1)
    chains = _chains(args)

    def parts(x: Tensor) -> Tensor:
        return x.permute(1, 3, 0, 2).reshape(1, sites, 2, batch * heads)

    dv, _, _, deta, dbonds = sweep_backward(
        SweepBackward(
            grad=parts(grad),
            parts=parts(g),
            v=None,
            source=None,
            energy=chains.energy,
            eta=chains.eta.expand(sites, -1),
            hopping=chains.hopping,
            two_sided=False,
        )
    )
    dhopping = g[..., 0] * moved[..., 0] - g[..., 1] * moved[..., 1]
    if sites > 1:
        rows = dbonds.expand(sites - 1, -1).view(sites - 1, batch, heads)
        dhopping[:, 1:] += rows.transpose(0, 1)
    dv, deta = (x.view(sites, batch, heads).transpose(0, 1).contiguous() for x in (dv, deta))
    return dv, deta, dhopping


def _chains(args: Attention | AttentionBackward) -> Sweep:
    """The arguments of a sweep (1, N, B * H) with a separate hopping for every bond of every chain.
    The t^2 g that enters the first site is added to its diagonal."""
    batch, sites, heads = args.v.shape
    lanes = batch * heads

    def rows(x: Tensor) -> Tensor:
        return x.transpose(0, 1).reshape(sites, lanes)

    potential, width = rows(args.v), args.eta.repeat(batch).view(1, lanes)
    if args.first_g is not None:
        pull = (args.hopping[:, 0].square()[..., None] * args.first_g).view(lanes, 2)
        potential = potential.clone()
        potential[0] -= pull[:, 0]
        width = width.repeat(sites, 1)
        width[0] += pull[:, 1]
    bonds = rows(args.hopping)[1:] if sites > 1 else potential.new_zeros(1, lanes)
    return Sweep(potential[None], None, args.energy.repeat(batch), width, bonds, two_sided=False)


def _sizes(args: Attention | AttentionBackward) -> tuple[tuple[int, ...], dict[str, int]]:
    """(N, H, chunks, K, U), and the tile sizes, which must be powers of two for products."""
    _, sites, heads, keys = args.query.shape
    values = args.value.shape[3]
    tiles = {"KEYS": _tile(keys), "VALUES": _tile(values), "CHUNK": ATTENTION_CHUNK}
    return (sites, heads, attention_chunks(sites), keys, values), tiles


def _tile(size: int) -> int:
    return max(16, 1 << (size - 1).bit_length())
