"""Resolvent attention on a CPU, parallel over chains."""

from __future__ import annotations

from typing import Any

import torch

from bkcore.kernels.backends.cpu import native
from bkcore.kernels.backends.interface import (
    ATTENTION_CHUNK,
    Attention,
    AttentionBackward,
    AttentionGradients,
    AttentionResults,
    attention_shapes,
    empty_attention_gradients,
    ordered_sum,
)


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
