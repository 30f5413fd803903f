"""One site at a time: the causal sweep of a stream, with no dispatcher in the way.

A generated token needs one site of every layer's sweep, and PyTorch's dispatcher alone costs
several times what the arithmetic does. `step` calls the kernel directly. It has no derivative.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bkcore.errors import DTypeError, ShapeError
from bkcore.kernels.selection import select


def step(
    state: Tensor,
    v: Tensor,
    source: Tensor | None,
    energy: Tensor,
    eta: Tensor,
    hopping: Tensor,
) -> Tensor:
    """Move the state of a causal sweep one site ahead, in place.

    Starting from zeros, the states are the rows of `bkcore.kernels.sweep`: bit for bit in the
    native kernels for more than 8 chains (B * H), where the sweep does not compute in float64; to
    rounding otherwise.

    Args:
        state: (B, C, H) contiguous: the site before, C = 2 or 4 parts as in `bkcore.kernels.ops`.
        v, source: (B, H) contiguous, the new site; source belongs to C = 4.
        energy, eta, hopping: (H,) contiguous, eta positive. The bond enters from the site before.
            All tensors are of one dtype, float32 or float64, and on one device.

    Returns:
        state.

    Raises:
        ShapeError, DTypeError: the tensors do not fit together.
    """
    batch, parts, lanes = state.shape
    _check(state, v, source, parts, (batch, lanes))
    for x in (energy, eta, hopping):
        if x.shape != (lanes,) or x.dtype != state.dtype or not x.is_contiguous():
            raise ShapeError(
                f"energy, eta and hopping must be contiguous ({lanes},) tensors of {state.dtype}, "
                f"got {tuple(x.shape)} of {x.dtype}"
            )
    select(state).step(state, v, source, energy, eta, hopping)
    return state


def _check(
    state: Tensor, v: Tensor, source: Tensor | None, parts: int, shape: tuple[int, int]
) -> None:
    if state.dtype not in (torch.float32, torch.float64) or v.dtype != state.dtype:
        raise DTypeError(
            f"state and v must both be float32 or float64, got {state.dtype} and {v.dtype}"
        )
    fits = v.shape == shape and v.is_contiguous() and state.is_contiguous()
    if source is None:
        fits = fits and parts == 2
    else:
        fits = fits and parts == 4 and source.shape == shape and source.is_contiguous()
        fits = fits and source.dtype == state.dtype
    if not fits:
        given = None if source is None else tuple(source.shape)
        raise ShapeError(
            f"state {tuple(state.shape)}, v {tuple(v.shape)} and source {given} do not fit: want "
            "contiguous (B, 2, H), (B, H) and no source, or (B, 4, H), (B, H) and (B, H)"
        )
