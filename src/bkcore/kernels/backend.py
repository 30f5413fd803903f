"""What a kernel backend has to offer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

Gradients = tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor]
"""Gradients of (v, source, energy, eta, hopping); None stands for a source that was not given."""


ATTENTION_CHUNK = 32
"""Sites between two states that the attention keeps for its adjoint, which recomputes those
between: 32 states of 32 x 32 are 256 KiB in float32."""


class SweepFunction(Protocol):
    """The forward sweep on checked tensors; see `bkcore.kernels.ops` for shapes and strides."""

    def __call__(
        self,
        v: Tensor,
        source: Tensor | None,
        energy: Tensor,
        eta: Tensor,
        hopping: Tensor,
        two_sided: bool,
    ) -> Tensor: ...


class SweepBackwardFunction(Protocol):
    """The adjoint of the sweep on checked tensors; v is given only if two-sided."""

    def __call__(
        self,
        grad: Tensor,
        parts: Tensor,
        v: Tensor | None,
        source: Tensor | None,
        energy: Tensor,
        eta: Tensor,
        hopping: Tensor,
        two_sided: bool,
    ) -> Gradients: ...


class SweepCodesFunction(Protocol):
    """The sweep from codes to codes on checked tensors; see `bkcore.kernels.codes`."""

    def __call__(
        self,
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
    ) -> Tensor: ...


class SweepRoundedFunction(Protocol):
    """The sweep between roundings on checked tensors; see `bkcore.kernels.rounded`."""

    def __call__(
        self,
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
    ) -> Tensor: ...


class ProductFunction(Protocol):
    """The product with a weight in codes on checked, contiguous tensors; see
    `bkcore.kernels.product`."""

    def __call__(
        self, x: Tensor, weight: Tensor, scales: Tensor, group_size: int, bits: int
    ) -> Tensor: ...


class RoundChannelsFunction(Protocol):
    """Rounding to what codes stand for on checked, contiguous tensors; see
    `bkcore.kernels.round`."""

    def __call__(
        self,
        x: Tensor,
        scale: Tensor,
        zero: Tensor,
        levels: Tensor | None,
        group_size: int,
        bits: int,
    ) -> Tensor: ...


class RoundChannelsBackwardFunction(Protocol):
    """The adjoint of rounding channels on checked, contiguous tensors: gradients of x, of every
    channel's scale (C,), and of the levels."""

    def __call__(
        self,
        grad: Tensor,
        x: Tensor,
        scale: Tensor,
        zero: Tensor,
        levels: Tensor | None,
        group_size: int,
        bits: int,
    ) -> tuple[Tensor, Tensor, Tensor | None]: ...


class RoundWeightFunction(Protocol):
    """Codes and values of a weight on checked, contiguous tensors; see `bkcore.kernels.weight`."""

    def __call__(
        self, weight: Tensor, scale: Tensor, group_size: int, bits: int
    ) -> tuple[Tensor, Tensor]: ...


class RoundWeightBackwardFunction(Protocol):
    """The adjoint of its values: gradients of the weight and of the scales."""

    def __call__(
        self, grad: Tensor, weight: Tensor, scale: Tensor, group_size: int, bits: int
    ) -> tuple[Tensor, Tensor]: ...


class StepFunction(Protocol):
    """One site of a stream, in place, on checked tensors; see `bkcore.kernels.stream`."""

    def __call__(
        self,
        state: Tensor,
        v: Tensor,
        source: Tensor | None,
        energy: Tensor,
        eta: Tensor,
        hopping: Tensor,
    ) -> None: ...


class AttentionFunction(Protocol):
    """Resolvent attention on checked, contiguous tensors; see `bkcore.kernels.attention`."""

    def __call__(
        self,
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
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]: ...


class AttentionBackwardFunction(Protocol):
    """The adjoint of the attention on checked, contiguous tensors."""

    def __call__(
        self,
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
    ) -> tuple[Tensor, ...]: ...


@dataclass(frozen=True)
class Backend:
    """One implementation of the sweep.

    `absent()` says why the backend cannot be used here at all, with a remedy, or returns None.
    `refuses(v)` says why it cannot take tensors of v's device and dtype, or returns None.
    `describe()` returns (instruction set, threads), where they mean anything.
    `reads_bfloat16` says whether `sweep` and `sweep_backward` take a bfloat16 v and source.
    """

    name: str
    absent: Callable[[], str | None]
    refuses: Callable[[Tensor], str | None]
    describe: Callable[[], tuple[str | None, int | None]]
    sweep: SweepFunction
    sweep_backward: SweepBackwardFunction
    sweep_codes: SweepCodesFunction
    sweep_rounded: SweepRoundedFunction
    product: ProductFunction
    round_channels: RoundChannelsFunction
    round_channels_backward: RoundChannelsBackwardFunction
    round_rows: Callable[[Tensor], Tensor]
    round_weight: RoundWeightFunction
    round_weight_backward: RoundWeightBackwardFunction
    step: StepFunction
    attention: AttentionFunction
    attention_backward: AttentionBackwardFunction
    reads_bfloat16: bool = False


def sites_last(x: Tensor) -> bool:
    """True if x (B, N, ..., H) lies in memory as one sequence after the other: (B, H, N, ...)."""
    return x.shape[1] > 1 and x.shape[-1] > 1 and x.stride(-1) != 1 and x.stride(1) < x.stride(-1)


def computed_dtype(v: Tensor) -> torch.dtype:
    """What a sweep of v computes in and returns."""
    return torch.float32 if v.dtype == torch.bfloat16 else v.dtype


def empty_parts(v: Tensor, components: int) -> Tensor:
    """Room for the parts (B, N, C, H) of v (B, N, H), with v's order of sites and lanes in memory:
    contiguous, or (B, H, N, C), where the parts of a site are complex numbers, if v has its
    sites last."""
    batch, sites, lanes = v.shape
    dtype = computed_dtype(v)
    if sites_last(v):
        return v.new_empty(batch, lanes, sites, components, dtype=dtype).permute(0, 2, 3, 1)
    return v.new_empty(batch, sites, components, lanes, dtype=dtype)


def empty_like_sites(parts: Tensor) -> Tensor:
    """Room for (B, N, H) in the order in memory of parts (B, N, C, H)."""
    batch, sites, _, lanes = parts.shape
    if sites_last(parts):
        return parts.new_empty(batch, lanes, sites).transpose(1, 2)
    return parts.new_empty(batch, sites, lanes)


def ordered_sum(terms: Tensor) -> Tensor:
    """Sum over dimension 0 by halving, in an order that depends on the length alone.

    `Tensor.sum` may split the work differently for another number of threads; this cannot.
    """
    while terms.shape[0] > 1:
        half = terms.shape[0] // 2
        folded = terms[:half] + terms[half : 2 * half]
        if terms.shape[0] % 2:
            folded[0] += terms[-1]
        terms = folded
    return terms[0] if terms.shape[0] else terms.new_zeros(terms.shape[1:])
