"""The sweep on a CPU: vectorized over lanes, parallel over batch and lanes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bkcore.kernels.backends.cpu import native
from bkcore.kernels.backends.interface import (
    Sweep,
    SweepBackward,
    SweepCodes,
    SweepGradients,
    SweepRounded,
    SweepStep,
    ordered_sum,
)
from bkcore.kernels.layout import empty_like_sites, empty_parts


def chains(args: Sweep | SweepBackward | SweepCodes | SweepRounded) -> dict[str, Any]:
    """The parameters of chains, in the form that the extension takes."""
    return {
        "energy": native.row(args.energy),
        "eta": native.rows(args.eta),
        "hopping": native.rows(args.hopping),
    }


def sizes(x: Tensor, lanes: int | None = None) -> dict[str, int]:
    """The sizes of x (B, N, H), or of codes with this many lanes."""
    batch, sites, width = x.shape
    return {"batch": batch, "sites": sites, "lanes": width if lanes is None else lanes}


def sweep(args: Sweep) -> Tensor:
    parts = empty_parts(args.v, 2 if args.source is None else 4)
    native.call(
        "sweep",
        two_sided=args.two_sided,
        double=args.v.dtype == torch.float64,
        sequential=native.is_sequential(),
        cache_bytes=native.CACHE_BYTES,
        **sizes(args.v),
        **chains(args),
        v=native.sequence(args.v),
        source=native.sequence(args.source),
        parts=native.sequence_of_parts(parts),
    )
    return parts


def sweep_backward(args: SweepBackward) -> SweepGradients:
    parts = args.parts
    dv = empty_like_sites(parts)
    dsource = None if args.source is None else empty_like_sites(parts)
    # One partial sum per batch element, so that the result does not depend on which thread worked
    # on which element. The kernel adds to those that all sites share.
    batch, _, _, lanes = parts.shape
    denergy = parts.new_zeros(batch, 1, lanes)
    deta = parts.new_zeros(batch, *args.eta.shape)
    dhopping = parts.new_zeros(batch, *args.hopping.shape)
    native.call(
        "sweep_backward",
        two_sided=args.two_sided,
        double=parts.dtype == torch.float64,
        cache_bytes=native.CACHE_BYTES,
        **sizes(dv),
        **chains(args),
        v=native.sequence(args.v),
        source=native.sequence(args.source),
        parts=native.sequence_of_parts(parts),
        grad=native.sequence_of_parts(args.grad),
        dv=native.sequence(dv),
        dsource=native.sequence(dsource),
        denergy=native.sequence(denergy),
        deta=native.sequence(deta),
        dhopping=native.sequence(dhopping),
    )
    parameters = ordered_sum(denergy)[0], ordered_sum(deta), ordered_sum(dhopping)
    return SweepGradients(dv, dsource, *parameters)


def sweep_step(args: SweepStep) -> None:
    batch, _, lanes = args.state.shape
    double = args.state.dtype == torch.float64
    native.call("sweep_step", args, batch=batch, lanes=lanes, double=double)
