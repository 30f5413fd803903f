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
    attention_shapes,
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
    g, out, psi, checkpoints = (args.v.new_empty(shape) for shape in attention_shapes(args))
    results = {"g": g, "out": out, "psi": psi, "checkpoints": checkpoints}
    buffers = {name: native.buffer(x) for name, x in results.items()}
    native.call("attention", **native.named(args), **_sizes(args), **buffers)
    return g, out, psi, checkpoints


def attention_backward(args: AttentionBackward) -> tuple[Tensor, ...]:
    v, (batch, _, heads) = args.v, args.v.shape
    results = {
        "dv": torch.empty_like(v),
        "dhopping": torch.empty_like(args.hopping),
        # One partial sum per chain, so that the result does not depend on the number of threads.
        "denergy": v.new_empty(batch, heads),
        "deta": v.new_empty(batch, heads),
        "dquery": torch.empty_like(args.query),
        "dkey": torch.empty_like(args.key),
        "dvalue": torch.empty_like(args.value),
        "dfirst_g": v.new_empty(batch, heads, 2),
        "dfirst_psi": torch.empty_like(args.dpsi),
    }
    buffers = {name: native.buffer(x) for name, x in results.items()}
    native.call("attention_backward", **native.named(args), **_sizes(args), **buffers)
    results |= {name: ordered_sum(results[name]) for name in ("denergy", "deta")}
    return tuple(results.values())


def recall_step(
    args: RecallStep, rounding: Sequence[ChannelRounding]
) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, _, keys, values = args.psi.shape
    features = torch.empty_like(args.value)
    g, psi = torch.empty_like(args.g), torch.empty_like(args.psi)
    computed = native.call(
        "recall_step",
        **native.named(args),
        batch=batch,
        heads=heads,
        groups=args.query.shape[-1] // keys,
        keys=keys,
        values=values,
        bits=rounding[0].bits if rounding else 8,
        rounding=[_rounding(part) for part in rounding],
        features=native.buffer(features),
        next_g=native.buffer(g),
        next_psi=native.buffer(psi),
    )
    if not computed:
        raise not_positive("eta", float(args.eta.min()))
    return features, g, psi


def _rounding(part: ChannelRounding) -> dict[str, Any]:
    return {
        "scale": native.buffer(part.scale),
        "zero": native.buffer(part.zero),
        "levels": native.buffer(part.levels),
        "group_size": part.group_size,
    }
