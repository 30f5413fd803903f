"""Whether Triton can be used here, and how its kernels are launched.

Triton is imported when the backend is first used. On CPU tensors, the kernels run only in Triton's
interpreter (TRITON_INTERPRET=1 in the environment), which is for tests.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from typing import Any

import torch
from torch import Tensor

_BLOCK = 32
"""Lanes per program: one warp."""

_CHAIN_BLOCKS = 1 << 18
"""How many blocks of chains fill a large GPU: 132 multiprocessors of up to 2,048 threads each."""

_SHORTEST, _LONGEST = 32, 1024
"""Sites per block. A block's matrix takes as much memory as 16 or 36 of its potentials."""

_GROUP = 64
"""How many blocks' matrices one thread goes through; more blocks are first grouped."""


def absent() -> str | None:
    """Why Triton cannot be used here, with what to do about it; None if it can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; pip install 'bkcore[gpu]'"
    if not torch.cuda.is_available() and not _interpreted():
        return "PyTorch sees no GPU; move to a machine with one, or choose 'cpu' or 'reference'"
    return None


def refuses(v: Tensor) -> str | None:
    if v.device.type != "cuda" and not (v.device.type == "cpu" and _interpreted()):
        return f"it takes CUDA tensors, not {v.device.type}; move them, or choose 'reference'"
    return None


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def kernels(name: str) -> Any:
    """The module with the kernels of `name`."""
    return importlib.import_module(f"{__package__}.{name}_kernels")


def on(device: torch.device) -> Any:
    """The context in which kernels run on this device."""
    return torch.cuda.device(device if device.type == "cuda" else -1)


def block_length(batch: int, sites: int, lanes: int, dtype: torch.dtype) -> int:
    """Sites per block: few enough that the blocks fill a GPU. All sites if there are enough chains,
    and in float64, since no wider type is left to compute what enters a block."""
    chains = max(batch * lanes, 1)
    if dtype == torch.float64 or chains >= _CHAIN_BLOCKS:
        return max(sites, 1)
    wanted = chains * sites // _CHAIN_BLOCKS
    return min(max(1 << max(wanted - 1, 0).bit_length(), _SHORTEST), _LONGEST)


class Launch:
    """Grid and constants that the kernels of one sweep share."""

    def __init__(self, batch: int, sites: int, lanes: int, dtype: torch.dtype, device: Any) -> None:
        self.batch, self.sites, self.lanes, self.device = batch, sites, lanes, device
        self.length = block_length(batch, sites, lanes, dtype)
        self.blocks = -(-sites // self.length)
        self.started = self.blocks > 1
        self.sizes = (sites, lanes, self.blocks)

    def run(self, kernel: Any, *args: Any, blocks: int | None = None, **constants: Any) -> None:
        """Run a kernel for every block (of sites, or as many as given), tile of lanes and batch
        element."""
        blocks = self.blocks if blocks is None else blocks
        programs = blocks * -(-self.lanes // _BLOCK) * self.batch
        if programs == 0:
            return
        # Products and sums are rounded separately, as on a CPU without fused multiply-add.
        with on(self.device):
            kernel[(programs,)](
                *args, **constants, BLOCK=_BLOCK, num_warps=1, enable_fp_fusion=False
            )

    def maps(self, dim: int, blocks: int | None = None) -> Tensor:
        blocks = self.blocks if blocks is None else blocks
        shape = (self.batch, blocks, dim, dim, 2, self.lanes)
        return torch.empty(shape, dtype=torch.float64, device=self.device)

    def entering(self, maps: Tensor, dim: int, reverse: bool = False) -> Tensor:
        """The states (B, blocks, dim - 1, 2, H) that enter the blocks with these maps."""
        blocks = maps.shape[1]
        groups = -(-blocks // _GROUP)
        first = maps
        constants = {"DIM": dim, "PAD": 2 if dim == 2 else 4, "REVERSE": reverse, "GROUP": _GROUP}
        if groups > 1:
            products = self.maps(dim, groups)
            self.run(
                kernels("sweep").compose,
                maps,
                products,
                blocks,
                groups,
                self.lanes,
                blocks=groups,
                **constants,
            )
            first = self.entering(products, dim, reverse)
        states = maps.new_empty(self.batch, blocks, dim - 1, 2, self.lanes)
        self.run(
            kernels("sweep").enter,
            maps,
            first,
            states,
            blocks,
            groups,
            self.lanes,
            blocks=groups,
            STARTED=groups > 1,
            **constants,
        )
        return states
