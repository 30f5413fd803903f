"""Resolvent attention on a CPU, parallel over chains, and the step around it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bkcore.kernels.backends.cpu import native
from bkcore.kernels.backends.interface import (
    ATTENTION_CHUNK,
    Attention,
    AttentionBackward,
    AttentionResults,
    RecallStep,
    ordered_sum,
)
from bkcore.kernels.checks import ChannelRounding, not_positive


def _sizes(args: Attention | AttentionBackward) -> dict[str, Any]:
    batch, sites, heads, keys = args.query.shape
    return {
        "double": args.v.dtype == torch.float64,
        "batch": batch,
        "sites": sites,
        "heads": heads,
        "keys": keys,
        "values": args.value.shape[3],
        "chunk": ATTENTION_CHUNK,
    }


def attention(args: Attention) -> AttentionResults:
    v = args.v
    batch, sites, heads, keys = args.query.shape
    values = args.value.shape[3]
    g = v.new_empty(batch, sites, heads, 2)
    out = v.new_empty(batch, sites, heads, 2, values)
    psi = v.new_empty(batch, heads, 2, keys, values)
    chunks = -(-sites // ATTENTION_CHUNK) if args.keep else 0
    checkpoints = v.new_empty(batch, heads, chunks, 2, keys, values)
    *tensors, keep = args
    inputs = dict(zip(Attention._fields, tensors, strict=False))
    native.call(
        "attention",
        **_sizes(args),
        **native.buffers(**inputs),
        **native.buffers(g=g, out=out, psi=psi, checkpoints=checkpoints if keep else None),
    )
    return g, out, psi, checkpoints


def attention_backward(args: AttentionBackward) -> tuple[Tensor, ...]:
    v, (batch, _, heads) = args.v, args.v.shape
    # One partial sum for each chain, so that the result does not depend on the threads.
    denergy, deta = v.new_empty(batch, heads), v.new_empty(batch, heads)
    dv, dhopping = torch.empty_like(v), torch.empty_like(v)
    dquery, dkey, dvalue = (torch.empty_like(x) for x in (args.query, args.key, args.value))
    dfirst_g, dfirst_psi = v.new_empty(batch, heads, 2), torch.empty_like(args.dpsi)
    native.call(
        "attention_backward",
        **_sizes(args),
        **native.buffers(**args._asdict()),
        **native.buffers(dv=dv, dhopping=dhopping, denergy=denergy, deta=deta),
        **native.buffers(dquery=dquery, dkey=dkey, dvalue=dvalue),
        **native.buffers(dfirst_g=dfirst_g, dfirst_psi=dfirst_psi),
    )
    denergy, deta = ordered_sum(denergy), ordered_sum(deta)
    return dv, dhopping, denergy, deta, dquery, dkey, dvalue, dfirst_g, dfirst_psi


def recall_step(
    args: RecallStep, rounding: Sequence[ChannelRounding]
) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, _, keys, values = args.psi.shape
    features = torch.empty_like(args.value)
    g, psi = torch.empty_like(args.g), torch.empty_like(args.psi)
    computed = native.call(
        "recall_step",
        [
            {
                **native.buffers(scale=part.scale, zero=part.zero, levels=part.levels),
                "group_size": part.group_size,
            }
            for part in rounding
        ],
        bits=rounding[0].bits if rounding else 8,
        batch=batch,
        heads=heads,
        groups=args.query.shape[-1] // keys,
        keys=keys,
        values=values,
        **native.buffers(**args._asdict()),
        **native.buffers(features=features, next_g=g, next_psi=psi),
    )
    if not computed:
        raise not_positive("eta", float(args.eta.min()))
    return features, g, psi
