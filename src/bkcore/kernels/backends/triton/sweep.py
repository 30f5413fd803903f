"""The sweep on a GPU: the host side of `sweep_kernels`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bkcore.kernels.backends.interface import (
    Sweep,
    SweepBackward,
    SweepCodes,
    SweepGradients,
    SweepStep,
    ordered_sum,
)
from bkcore.kernels.backends.reference.codes import bounds_between
from bkcore.kernels.backends.triton.launch import Launch, kernels
from bkcore.kernels.layout import empty_like_sites, empty_parts


class _Quantizers:
    """Quantizers of the input and output codes; none if the kernels read and write numbers."""

    def __init__(
        self,
        dummy: Tensor,
        bits: int = 0,
        inputs: tuple[Tensor, Tensor] | None = None,
        outputs: tuple[Tensor, Tensor] | None = None,
        levels: Tensor | None = None,
        bounds: Tensor | None = None,
    ) -> None:
        # One scale may be shared by all sites while zero points are not, but the kernels use one
        # stride for both.
        in_scale, in_zero = torch.broadcast_tensors(*inputs) if inputs else (dummy, dummy)
        out_scale, out_zero = torch.broadcast_tensors(*outputs) if outputs else (dummy, dummy)
        self.input = (
            in_scale.contiguous(),
            in_zero.contiguous(),
            dummy if levels is None else levels,
        )
        self.output = (
            out_scale.contiguous(),
            out_zero.contiguous(),
            dummy if bounds is None else bounds.contiguous(),
        )
        self.in_site = in_scale.shape[-1] if inputs and in_scale.shape[1] > 1 else 0
        self.out_site = out_scale.shape[-1] if outputs and out_scale.shape[1] > 1 else 0
        self.input_constants = {"BITS": bits, "LEVELS": levels is not None}
        self.constants = {**self.input_constants, "OUT_LEVELS": bounds is not None}


def sweep(args: Sweep) -> Tensor:
    parts = empty_parts(args.v, 2 if args.source is None else 4)
    _sweep_into(parts, args, _Quantizers(args.v))
    return parts


def sweep_codes(args: SweepCodes) -> Tensor:
    batch, sites, row = args.v.shape
    codes = args.v.new_empty(batch, sites, args.out_scale.shape[0], row)
    quantizers = _Quantizers(
        args.v,
        args.bits,
        (args.in_scale, args.in_zero),
        (args.out_scale, args.out_zero),
        args.in_levels,
        None if args.out_levels is None else bounds_between(args.out_levels),
    )
    _sweep_into(codes, Sweep(*args[:5], args.two_sided), quantizers)
    return codes


def _sweep_into(out: Tensor, args: Sweep, quantizers: _Quantizers) -> None:
    """Sweep v and the source; inputs and output may be numbers or codes."""
    v, source, energy, two_sided = args.v, args.source, args.energy, args.two_sided
    batch, sites, lanes = v.shape[0], v.shape[1], energy.shape[0]
    launch = Launch(batch, sites, lanes, energy.dtype, v.device)
    args = _contiguous(args)
    chain = args.energy, args.eta, args.hopping
    left, right = _entering(launch, args, quantizers)
    rows: dict[str, Any] = {
        "LENGTH": launch.length,
        "STARTED": launch.started,
        "SITE_ETA": len(args.eta) > 1,
        "SITE_HOPPING": len(args.hopping) > 1,
        **quantizers.constants,
    }
    if two_sided:
        codes = rows["BITS"] != 0
        scratch = energy.new_empty(batch, sites, 2, lanes) if codes else out
        launch.run(
            kernels("sweep").two_sided,
            *(v, *chain, left, right, scratch, out, *quantizers.input, *quantizers.output),
            *(*launch.sizes, *v.stride(), quantizers.in_site),
            *(*scratch.stride(), *out.stride(), quantizers.out_site),
            **rows,
        )
        return
    other = v if source is None else source
    launch.run(
        kernels("sweep").causal,
        *(v, other, *chain, left, out),
        *(*quantizers.input, *quantizers.output, *launch.sizes, *v.stride(), *other.stride()),
        *(quantizers.in_site, *out.stride(), quantizers.out_site),
        SOURCE=source is not None,
        **rows,
    )


def _contiguous(args: Sweep) -> Sweep:
    """The arguments with their parameters contiguous."""
    energy, eta, hopping = (x.contiguous() for x in (args.energy, args.eta, args.hopping))
    return args._replace(energy=energy, eta=eta, hopping=hopping)


def _entering(launch: Launch, args: Sweep, quantizers: _Quantizers) -> tuple[Tensor, Tensor]:
    """(g, psi) that enter the blocks from the left, and r from the right; arbitrary if there is
    only one block."""
    v, source, energy, eta, hopping, two_sided = args
    if not launch.started:
        return energy, energy
    dim = 2 if source is None else 3
    left, right = launch.maps(dim), launch.maps(2) if two_sided else energy
    other = v if source is None else source
    launch.run(
        kernels("sweep").sweep_maps,
        *(v, other, energy, eta, hopping, left, right, *quantizers.input),
        *(*launch.sizes, *v.stride(), *other.stride(), quantizers.in_site),
        LENGTH=launch.length,
        SOURCE=source is not None,
        TWO_SIDED=two_sided,
        SITE_ETA=len(eta) > 1,
        SITE_HOPPING=len(hopping) > 1,
        **quantizers.input_constants,
    )
    from_right = launch.entering(right, 2, reverse=True) if two_sided else energy
    return launch.entering(left, dim), from_right


def sweep_backward(args: SweepBackward) -> SweepGradients:
    parts, source = args.parts, args.source
    batch, sites, _, lanes = parts.shape
    launch = Launch(batch, sites, lanes, parts.dtype, parts.device)
    dv = empty_like_sites(parts)
    dsource = None if source is None else torch.empty_like(dv)
    site_eta, site_hopping = len(args.eta) > 1, len(args.hopping) > 1

    def terms(per_site: bool, rows: int) -> Tensor:
        """One term per row of a parameter, or per block if all sites share it."""
        shape = (batch, rows if per_site else launch.blocks, lanes)
        return torch.empty(shape, dtype=torch.float64, device=parts.device)

    denergy = terms(False, 0)
    deta, dhopping = terms(site_eta, sites), terms(site_hopping, sites - 1)
    results = (denergy, deta, dhopping)
    rows: dict[str, Any] = {
        "LENGTH": launch.length,
        "SITE_ETA": site_eta,
        "SITE_HOPPING": site_hopping,
    }
    if args.two_sided:
        _two_sided_adjoint(launch, args, dv, results, rows)
    else:
        _causal_adjoint(launch, args, dv, dsource, results, rows)
    return SweepGradients(
        dv,
        dsource,
        _total(denergy)[0].to(parts.dtype),
        _total(deta, site_eta).to(parts.dtype),
        _total(dhopping, site_hopping).to(parts.dtype),
    )


def _causal_adjoint(
    launch: Launch,
    args: SweepBackward,
    dv: Tensor,
    dsource: Tensor | None,
    results: tuple[Tensor, Tensor, Tensor],
    rows: dict[str, Any],
) -> None:
    parts, grad, source, hopping = args.parts, args.grad, args.source, args.hopping.contiguous()
    dim = 2 if source is None else 3
    other = dv if source is None else source
    states = dv
    strides = (*launch.sizes, *parts.stride(), *other.stride())
    if launch.started:
        maps = launch.maps(dim)
        launch.run(
            kernels("sweep_adjoint").causal_adjoint_maps,
            *(parts, grad, other, hopping, maps, *strides),
            LENGTH=launch.length,
            SOURCE=source is not None,
            SITE_HOPPING=rows["SITE_HOPPING"],
        )
        states = launch.entering(maps, dim, reverse=True)
    launch.run(
        kernels("sweep_adjoint").causal_adjoint,
        *(parts, grad, other, hopping, states, dv, dv if dsource is None else dsource),
        *(*results, *strides, *dv.stride()),
        SOURCE=source is not None,
        STARTED=launch.started,
        **rows,
    )


def _two_sided_adjoint(
    launch: Launch,
    args: SweepBackward,
    dv: Tensor,
    results: tuple[Tensor, Tensor, Tensor],
    rows: dict[str, Any],
) -> None:
    grad, parts, v = args.grad, args.parts, args.v
    assert v is not None
    forward = _contiguous(Sweep(v, None, args.energy, args.eta, args.hopping, two_sided=True))
    chain = forward.energy, forward.eta, forward.hopping
    left, right = _entering(launch, forward, _Quantizers(v))
    left_sums, right_sums = left, right
    strides = (*launch.sizes, *v.stride(), *parts.stride())
    if launch.started:
        left_maps, right_maps = launch.maps(2), launch.maps(2)
        launch.run(
            kernels("sweep_adjoint").two_sided_adjoint_maps,
            *(v, grad, *chain, left, right, left_maps, right_maps, *strides),
            **rows,
        )
        left_sums = launch.entering(left_maps, 2)
        right_sums = launch.entering(right_maps, 2, reverse=True)
    scratch = parts.new_empty(launch.batch, launch.sites, 4, launch.lanes)  # r and T'
    launch.run(
        kernels("sweep_adjoint").two_sided_adjoint,
        *(v, grad, parts, *chain, left, right, left_sums, right_sums, scratch, dv, *results),
        *(*strides, *scratch.stride(), *dv.stride()),
        STARTED=launch.started,
        **rows,
    )


def _total(terms: Tensor, per_site: bool = False) -> Tensor:
    """Sum (B, R, H) over the batch, and also over R for a parameter that all sites share."""
    return ordered_sum(terms) if per_site else ordered_sum(terms.flatten(0, 1)).unsqueeze(0)


def sweep_step(args: SweepStep) -> None:
    state, v, source, energy, eta, hopping = args
    batch, _, lanes = state.shape
    launch = Launch(1, 1, batch * lanes, state.dtype, state.device)
    launch.run(
        kernels("sweep").one_site,
        *(state, v, v if source is None else source, energy, eta, hopping, batch * lanes, lanes),
        SOURCE=source is not None,
    )
