"""The causal sweep of a stream, one site at a time, bypassing PyTorch's dispatcher.

A generated token needs one site of every layer's sweep, and the dispatcher alone takes several
times as long as the arithmetic. `sweep_step` calls the kernel directly. It has no derivative.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bkcore.errors import DTypeError, ShapeError
from bkcore.kernels.backends.interface import SweepStep
from bkcore.kernels.backends.selection import select
from bkcore.kernels.checks import Expected, check_no_gradient, check_plain, check_tensors


def sweep_step(
    state: Tensor,
    v: Tensor,
    source: Tensor | None,
    energy: Tensor,
    eta: Tensor,
    hopping: Tensor,
) -> Tensor:
    """Move the state of a causal sweep one site ahead, in place.

    Starting from zeros, the states are the rows of `bkcore.kernels.sweep`. They are equal bit for
    bit in the native kernels for more than 8 chains (B * H), where the sweep does not compute in
    float64, and otherwise up to rounding.

    Args:
        state: (B, C, H) contiguous, the previous site, with C = 2 or 4 parts as in
            `bkcore.kernels.ops.sweep`.
        v, source: (B, H) contiguous, the new site; a source requires C = 4.
        energy, eta, hopping: (H,) contiguous, eta positive. The hopping is the bond to the previous
            site. All tensors have the same dtype, float32 or float64, and device.

    Returns:
        state.

    Raises:
        ShapeError, DTypeError: the tensors do not fit together.
        InputError: a tensor is on another device, or requires a gradient, which would be lost.
    """
    args = SweepStep(state, v, source, energy, eta, hopping)
    _check(args)
    select(state).sweep_step(args)
    return state


def _check(args: SweepStep) -> None:
    state = args.state
    if state.ndim != 3 or state.shape[1] != (2 if args.source is None else 4):
        raise ShapeError(
            "state must be (B, 2, H) without a source and (B, 4, H) with one, not "
            f"{tuple(state.shape)}"
        )
    dtype, device = state.dtype, state.device
    if dtype not in (torch.float32, torch.float64):
        raise DTypeError(f"state must be float32 or float64, not {dtype}")
    batch, _, lanes = state.shape
    row, site = (lanes,), (batch, lanes)
    expected: dict[str, Expected] = {
        "state": (state, state.shape, dtype),
        "v": (args.v, site, dtype),
        "source": (args.source, site, dtype),
        "energy": (args.energy, row, dtype),
        "eta": (args.eta, row, dtype),
        "hopping": (args.hopping, row, dtype),
    }
    check_tensors(expected, device, "like the state")
    for name, (x, _, _) in expected.items():
        if x is not None:
            check_plain(name, x)
    tensors = zip(SweepStep._fields, args, strict=True)
    check_no_gradient("sweep_step", "bkcore.kernels.sweep", tensors)
