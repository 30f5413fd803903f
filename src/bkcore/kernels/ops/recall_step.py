"""One site of resolvent attention, with everything the language model computes around it, at once.

A generated token needs one site of every layer, and calling PyTorch and the operators piece by
piece costs ten times what the arithmetic does. `recall_step` gives, bit for bit, what these pieces
give: the formulas of `bkcore.kernels.recall`, with gate, barrier, query, key, value, real and imag
rounded by `round_channels`, or not, and the hopping 0 where g before is 0. The CPU backend has a
kernel for it; the others call the pieces. It has no derivative.

Layout, all float32, on one device
-------------------
    gate, barrier      (B, 1, H)
    query, key         (B, 1, G K), shared by G groups of neighbouring heads; G divides H
    value              (B, 1, H U)
    rate, height, eta  (H,), eta positive
    weight             (3, H U)
    g, psi             (B, H, 2) and (B, H, 2, K, U), the state; g is 0 before the first site
    result             (B, 1, H U)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bkcore.errors import InputError, ShapeError
from bkcore.kernels.backends.interface import RecallStep, RecallStepResults
from bkcore.kernels.backends.selection import select
from bkcore.kernels.checks import ChannelRounding, check_no_gradient, check_tensors

_PARTS = ("gate", "barrier", "query", "key", "value", "real", "imag")


def has_recall_step(x: Tensor) -> bool:
    """Whether `recall_step` takes tensors like x now: float32, no gradient to keep, no graph to
    trace. Every backend has it, so that none is asked."""
    return (
        x.dtype == torch.float32
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
    )


def recall_step(
    gate: Tensor,
    barrier: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rate: Tensor,
    height: Tensor,
    eta: Tensor,
    weight: Tensor,
    g: Tensor,
    psi: Tensor,
    rounding: Sequence[ChannelRounding] = (),
) -> RecallStepResults:
    """Move a stream one site ahead; formulas and layout are those of this module's text.

    Args:
        gate, barrier, query, key, value: the inputs of the new site.
        rate, height, eta, weight: parameters.
        g, psi: the state before the site.
        rounding: one each for gate, barrier, query, key, value, real and imag, all with the same
            bits; or empty for none.

    Returns:
        The result, and the new g and psi; the given state is not changed.

    Raises:
        ShapeError, DTypeError: the tensors do not fit together.
        InputError: a tensor is on another device, or requires a gradient, which would be lost; or,
            looked at on the CPU only, an eta is not positive.
        BackendError: a forced backend is not available or cannot take the tensors.
    """
    args = RecallStep(gate, barrier, query, key, value, rate, height, eta, weight, g, psi)
    _check(args)
    if rounding:
        _check_rounding(args, rounding)
    ready = RecallStep(*(x.resolve_neg().contiguous() for x in args))
    return select(gate).recall_step(ready, rounding)


def _check(args: RecallStep) -> None:
    query, psi = args.query, args.psi
    if psi.ndim != 5:
        raise ShapeError(f"psi must be (B, H, 2, K, U), not {tuple(psi.shape)}")
    batch, heads, _, keys, values = psi.shape
    shared, width = query.shape[-1] if query.ndim else 0, heads * values
    if not shared or not keys or shared % keys or heads % (shared // keys):
        raise ShapeError(
            f"query has {shared} channels, but must have groups of {keys} that {heads} heads share"
        )
    chain, group, head = (batch, 1, heads), (batch, 1, shared), (heads,)
    shapes: tuple[tuple[int, ...], ...] = (
        *(chain, chain, group, group, (batch, 1, width)),
        *(head, head, head, (3, width)),
        *((batch, heads, 2), (batch, heads, 2, keys, values)),
    )
    expected = zip(RecallStep._fields, args, shapes, strict=True)
    check_tensors(
        {name: (x, shape, torch.float32) for name, x, shape in expected}, args.gate.device
    )
    tensors = zip(RecallStep._fields, args, strict=True)
    check_no_gradient("recall_step", "bkcore.kernels.attention and its pieces", tensors)


def _check_rounding(args: RecallStep, rounding: Sequence[ChannelRounding]) -> None:
    if len(rounding) != len(_PARTS):
        raise InputError(
            f"rounding must have one entry for each of {', '.join(_PARTS)}, or be empty, not "
            f"{len(rounding)} entries"
        )
    rounded = (*args[:5], args.value, args.value)
    for name, x, part in zip(_PARTS, rounded, rounding, strict=True):
        if part.scale.device != x.device:
            raise InputError(f"{name} is on {x.device}, but to be rounded on {part.scale.device}")
        if part.channels != x.shape[-1] or part.bits != rounding[0].bits:
            raise ShapeError(
                f"{name} has {x.shape[-1]} channels, but its rounding is for {part.channels} with "
                f"{part.bits} bits; {_PARTS[0]} has {rounding[0].bits} bits"
            )
