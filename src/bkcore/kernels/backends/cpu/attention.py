"""Resolvent attention on a CPU, parallel over chains, and the step around it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from bkcore.kernels.backends.cpu import native
from bkcore.kernels.backends.interface import (
    ATTENTION_CHUNK,
    Attention,
    AttentionBackward,
    AttentionGradients,
    AttentionResults,
    RecallStep,
    RecallStepResults,
    attention_shapes,
    empty_attention_gradients,
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
    results = AttentionResults(*(args.v.new_empty(shape) for shape in attention_shapes(args)))
    native.call("attention", args, results, **_sizes(args))
    return results


def attention_backward(args: AttentionBackward) -> AttentionGradients:
    batch, _, heads = args.v.shape
    # One partial sum for each chain, so that the result does not depend on the threads.
    energy, eta = args.v.new_empty(2, batch, heads)
    grads = empty_attention_gradients(args)._replace(energy=energy, eta=eta)
    results = {f"d{name}": native.buffer(x) for name, x in grads._asdict().items()}
    native.call("attention_backward", args, **_sizes(args), **results)
    return grads._replace(energy=ordered_sum(energy), eta=ordered_sum(eta))


def recall_step(args: RecallStep, rounding: Sequence[ChannelRounding]) -> RecallStepResults:
    batch, heads, _, keys, values = args.psi.shape
    features = torch.empty_like(args.value)
    g, psi = torch.empty_like(args.g), torch.empty_like(args.psi)
    computed = native.call(
        "recall_step",
        args,
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
    return RecallStepResults(features, g, psi)


def _rounding(part: ChannelRounding) -> dict[str, Any]:
    return {
        "scale": native.buffer(part.scale),
        "zero": native.buffer(part.zero),
        "levels": native.buffer(part.levels),
        "group_size": part.group_size,
    }
