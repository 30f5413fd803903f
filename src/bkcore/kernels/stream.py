"""One site at a time: the causal sweep of a stream, with no dispatcher in the way.

A generated token needs one site of every layer's sweep, and PyTorch's dispatcher alone costs
several times what the arithmetic does. `step` calls the kernel directly. It has no derivative.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bkcore.errors import DTypeError, InputError, ShapeError
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
        InputError: a tensor requires a gradient, which would be lost.
    """
    _check(state, v, source, energy, eta, hopping)
    select(state).step(state, v, source, energy, eta, hopping)
    return state


def _check(
    state: Tensor,
    v: Tensor,
    source: Tensor | None,
    energy: Tensor,
    eta: Tensor,
    hopping: Tensor,
) -> None:
    if state.ndim != 3 or state.shape[1] != (2 if source is None else 4):
        raise ShapeError(
            "state must be (B, 2, H) without a source and (B, 4, H) with one, got "
            f"{tuple(state.shape)}"
        )
    dtype, device = state.dtype, state.device
    if dtype not in (torch.float32, torch.float64):
        raise DTypeError(f"state must be float32 or float64, got {dtype}")
    batch, _, lanes = state.shape
    row, site = (lanes,), (batch, lanes)
    _check_one("state", state, state.shape, dtype, device)
    _check_one("v", v, site, dtype, device)
    if source is not None:
        _check_one("source", source, site, dtype, device)
    _check_one("energy", energy, row, dtype, device)
    _check_one("eta", eta, row, dtype, device)
    _check_one("hopping", hopping, row, dtype, device)


def _check_one(
    name: str, x: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> None:
    if x.shape != shape:
        raise ShapeError(f"{name} must be {tuple(shape)} like the state, got {tuple(x.shape)}")
    if x.dtype != dtype or x.device != device:
        raise DTypeError(
            f"{name} must be {dtype} on {device} like the state, got {x.dtype} on {x.device}"
        )
    if not x.is_contiguous() or x.is_neg():
        raise ShapeError(
            f"{name} must be contiguous in memory: pass {name}.contiguous(), or "
            f"{name}.resolve_neg() for the imaginary part of a conjugate"
        )
    if x.requires_grad and torch.is_grad_enabled():
        raise InputError(
            f"step has no derivative, and {name} requires one: call it under torch.no_grad(), "
            "or use bkcore.kernels.sweep"
        )
