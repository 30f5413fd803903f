"""The interface of a backend: one function per operator, and the arguments that it gets.

A function gets its arguments as one bundle. They are checked, and laid out as described in the
operator's file in `bkcore.kernels.ops`, which also gives their shapes and dtypes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

ATTENTION_CHUNK = 32
"""The attention keeps a state every so many sites for its adjoint, which recomputes those between:
32 states of 32 x 32 take 256 KiB in float32."""


class Sweep(NamedTuple):
    v: Tensor
    source: Tensor | None
    energy: Tensor
    eta: Tensor
    hopping: Tensor
    two_sided: bool


class SweepBackward(NamedTuple):
    """v is given only if two-sided."""

    grad: Tensor
    parts: Tensor
    v: Tensor | None
    source: Tensor | None
    energy: Tensor
    eta: Tensor
    hopping: Tensor
    two_sided: bool


class SweepCodes(NamedTuple):
    v: Tensor
    source: Tensor | None
    energy: Tensor
    eta: Tensor
    hopping: Tensor
    in_scale: Tensor
    in_zero: Tensor
    out_scale: Tensor
    out_zero: Tensor
    in_levels: Tensor | None
    out_levels: Tensor | None
    bits: int
    two_sided: bool


class SweepRounded(NamedTuple):
    v: Tensor
    energy: Tensor
    eta: Tensor
    hopping: Tensor
    scale: Tensor
    zero: Tensor
    levels: Tensor | None
    group_size: int
    bits: int
    two_sided: bool


class SweepStep(NamedTuple):
    state: Tensor
    v: Tensor
    source: Tensor | None
    energy: Tensor
    eta: Tensor
    hopping: Tensor


class Attention(NamedTuple):
    v: Tensor
    hopping: Tensor
    energy: Tensor
    eta: Tensor
    query: Tensor
    key: Tensor
    value: Tensor
    first_g: Tensor | None
    first_psi: Tensor | None
    keep: bool


class AttentionBackward(NamedTuple):
    dg: Tensor
    dout: Tensor
    dpsi: Tensor
    v: Tensor
    hopping: Tensor
    energy: Tensor
    eta: Tensor
    query: Tensor
    key: Tensor
    value: Tensor
    first_g: Tensor | None
    g: Tensor
    checkpoints: Tensor


class Product(NamedTuple):
    x: Tensor
    weight: Tensor
    scales: Tensor
    group_size: int
    bits: int


class Silu(NamedTuple):
    x: Tensor


class RmsNorm(NamedTuple):
    x: Tensor
    weight: Tensor
    eps: float


class UnitLength(NamedTuple):
    x: Tensor
    eps: float


class ShortConvolution(NamedTuple):
    x: Tensor
    weight: Tensor


class DenseProduct(NamedTuple):
    x: Tensor
    weight: Tensor


class Softmax(NamedTuple):
    x: Tensor


class RoundChannels(NamedTuple):
    x: Tensor
    scale: Tensor
    zero: Tensor
    levels: Tensor | None
    group_size: int
    bits: int


class RoundChannelsBackward(NamedTuple):
    grad: Tensor
    x: Tensor
    scale: Tensor
    zero: Tensor
    levels: Tensor | None
    group_size: int
    bits: int


class RoundRows(NamedTuple):
    x: Tensor


class RoundWeight(NamedTuple):
    weight: Tensor
    scale: Tensor
    group_size: int
    bits: int


class RoundWeightBackward(NamedTuple):
    grad: Tensor
    weight: Tensor
    scale: Tensor
    group_size: int
    bits: int


class SweepGradients(NamedTuple):
    """source is None if none was given."""

    v: Tensor
    source: Tensor | None
    energy: Tensor
    eta: Tensor
    hopping: Tensor


class AttentionResults(NamedTuple):
    g: Tensor
    out: Tensor
    psi: Tensor
    checkpoints: Tensor


class AttentionGradients(NamedTuple):
    v: Tensor
    hopping: Tensor
    energy: Tensor
    eta: Tensor
    query: Tensor
    key: Tensor
    value: Tensor
    first_g: Tensor
    first_psi: Tensor


class RoundChannelsGradients(NamedTuple):
    """scale has one for each channel, (C,); levels is None if there are none."""

    x: Tensor
    scale: Tensor
    levels: Tensor | None


class RoundWeightResults(NamedTuple):
    codes: Tensor
    values: Tensor


class RoundWeightGradients(NamedTuple):
    weight: Tensor
    scale: Tensor


@dataclass(frozen=True)
class Backend:
    """One implementation of every operator.

    `absent()` returns why the backend cannot be used here at all, with a remedy; or None.
    `refuses(v)` returns why it cannot take tensors of v's device and dtype; or None.
    `describe()` returns (instruction set, threads), with None for what does not apply.
    `reads_bfloat16` says whether `sweep` and `sweep_backward` take a bfloat16 v and source.
    """

    name: str
    absent: Callable[[], str | None]
    refuses: Callable[[Tensor], str | None]
    describe: Callable[[], tuple[str | None, int | None]]
    sweep: Callable[[Sweep], Tensor]
    sweep_backward: Callable[[SweepBackward], SweepGradients]
    sweep_codes: Callable[[SweepCodes], Tensor]
    sweep_rounded: Callable[[SweepRounded], Tensor]
    sweep_step: Callable[[SweepStep], None]
    attention: Callable[[Attention], AttentionResults]
    attention_backward: Callable[[AttentionBackward], AttentionGradients]
    product: Callable[[Product], Tensor]
    silu: Callable[[Silu], Tensor]
    rms_norm: Callable[[RmsNorm], Tensor]
    unit_length: Callable[[UnitLength], Tensor]
    short_convolution: Callable[[ShortConvolution], Tensor]
    dense_product: Callable[[DenseProduct], Tensor]
    softmax: Callable[[Softmax], Tensor]
    round_channels: Callable[[RoundChannels], Tensor]
    round_channels_backward: Callable[[RoundChannelsBackward], RoundChannelsGradients]
    round_rows: Callable[[RoundRows], Tensor]
    round_weight: Callable[[RoundWeight], RoundWeightResults]
    round_weight_backward: Callable[[RoundWeightBackward], RoundWeightGradients]
    reads_bfloat16: bool = False


def ordered_sum(terms: Tensor) -> Tensor:
    """Sum over dimension 0 by halving, in an order that depends only on the length.

    `Tensor.sum` may split the work differently for another number of threads; this does not.
    """
    while terms.shape[0] > 1:
        half = terms.shape[0] // 2
        folded = terms[:half] + terms[half : 2 * half]
        if terms.shape[0] % 2:
            folded[0] += terms[-1]
        terms = folded
    return terms[0] if terms.shape[0] else terms.new_zeros(terms.shape[1:])


def attention_chunks(sites: int) -> int:
    """How many states the attention keeps of so many sites."""
    return -(-sites // ATTENTION_CHUNK)


def attention_shapes(args: Attention) -> list[tuple[int, ...]]:
    """Shapes of g, out, psi and the checkpoints."""
    batch, sites, heads, keys = args.query.shape
    values = args.value.shape[3]
    chunks = attention_chunks(sites) if args.keep else 0
    return [
        (batch, sites, heads, 2),
        (batch, sites, heads, 2, values),
        (batch, heads, 2, keys, values),
        (batch, heads, chunks, 2, keys, values),
    ]


def empty_attention_gradients(args: AttentionBackward) -> AttentionGradients:
    """Room for the gradients of an attention."""
    v, (batch, _, heads) = args.v, args.v.shape
    chains = v, args.hopping, args.energy, args.eta
    like = *chains, args.query, args.key, args.value, v.new_empty(batch, heads, 2), args.dpsi
    return AttentionGradients(*(x.new_empty(x.shape) for x in like))
