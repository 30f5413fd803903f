"""What a language model remembers of its text: a state of fixed size, whatever the length."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from bkcore.errors import CheckpointError, InputError, ShapeError
from bkcore.reading import open_regular

_MOST = 2**62
"""Tokens that a saved state may have read; there is room above for those that follow."""


@dataclass(frozen=True)
class LayerState:
    """The memory of one layer after some sites; zeros before the first.

    Attributes:
        taps: (B, W - 1, C), the past inputs that the next convolutions of width W will see.
        g: (B, H, 2), Re and Im of the last diagonal entry of the resolvent.
        psi: (B, H, 2, K, U), Re and Im of the propagated source.
    """

    taps: Tensor
    g: Tensor
    psi: Tensor


@dataclass(frozen=True)
class StreamState:
    """The memory of a model: one sequence per row, each with its own length. It is immutable.

    A model takes and returns it as `cache_params`; the one that `model(ids, use_cache=True)`
    returns continues after `ids`.

    Attributes:
        layers: one state per layer.
        seen: int64 (B,), number of tokens read.
    """

    layers: tuple[LayerState, ...]
    seen: Tensor

    is_compileable = False  # transformers asks whether generate() should compile

    def __len__(self) -> int:
        """Sequences."""
        return len(self.seen)

    def select(self, rows: Tensor) -> StreamState:
        """Select sequences, in any order and possibly repeated.

        Args:
            rows: int64 (R,), in [0, len(self)).

        Raises:
            InputError: if there is no such row.
        """
        if rows.numel() and not 0 <= int(rows.min()) <= int(rows.max()) < len(self):
            raise InputError(f"rows {rows.tolist()} must be in [0, {len(self)})")
        picked = [
            LayerState(*(getattr(layer, f.name)[rows] for f in fields(layer)))
            for layer in self.layers
        ]
        return StreamState(tuple(picked), self.seen[rows])

    def to(self, device: torch.device | str) -> StreamState:
        """A copy on another device."""
        moved = [
            LayerState(*(getattr(layer, f.name).to(device) for f in fields(layer)))
            for layer in self.layers
        ]
        return StreamState(tuple(moved), self.seen.to(device))

    @staticmethod
    def batch(states: Sequence[StreamState]) -> StreamState:
        """Join all sequences of several states, of any lengths, into one batch.

        Raises:
            InputError: if `states` is empty.
            ShapeError: if they belong to different models.
        """
        if not states:
            raise InputError("batch() needs at least one state, not an empty sequence")
        if len({_shape(state) for state in states}) > 1:
            raise ShapeError("states of different models cannot be batched: their sizes differ")
        layers = [
            LayerState(
                *(torch.cat([getattr(part, f.name) for part in parts]) for f in fields(LayerState))
            )
            for parts in zip(*(state.layers for state in states), strict=True)
        ]
        return StreamState(tuple(layers), torch.cat([state.seen for state in states]))

    def save(self, path: str | Path) -> None:
        """Write a safetensors file, completely or not at all.

        Raises:
            CheckpointError: if it cannot be written.
        """
        path = Path(path)
        tensors = {"seen": self.seen}
        for n, layer in enumerate(self.layers):
            tensors |= {f"{n}.{f.name}": getattr(layer, f.name) for f in fields(layer)}
        tensors = {name: x.detach().cpu().contiguous() for name, x in tensors.items()}
        try:
            with tempfile.TemporaryDirectory(prefix=".saving-", dir=path.parent) as folder:
                save_file(tensors, Path(folder) / path.name)
                os.replace(Path(folder) / path.name, path)
        except (OSError, SafetensorError, ValueError) as error:
            raise CheckpointError(f"cannot write a state to {path}: {error}") from error

    @staticmethod
    def load(path: str | Path) -> StreamState:
        """Read what `save` wrote, bit for bit.

        Raises:
            CheckpointError: if the file is missing, damaged or not a state.
        """
        path = Path(path)
        try:
            with open_regular(path):  # refuses a pipe, which would block
                tensors = load_file(path)
        except (OSError, ValueError, SafetensorError) as error:
            raise CheckpointError(f"{path} is not a saved state, or damaged: {error}") from error
        seen = tensors.pop("seen", None)
        count = len(tensors) // len(fields(LayerState))
        names = [[f"{n}.{f.name}" for f in fields(LayerState)] for n in range(count)]
        if seen is None or not names or tensors.keys() != {each for row in names for each in row}:
            raise CheckpointError(f"{path} is not a saved state, or damaged: it lacks tensors")
        layers = tuple(LayerState(*(tensors[name] for name in row)) for row in names)
        if not _is_whole(layers, seen):
            raise CheckpointError(
                f"{path} is not a saved state, or damaged: its shapes, dtypes or counts are not "
                "those of one"
            )
        return StreamState(layers, seen)


def _is_whole(layers: Sequence[LayerState], seen: Tensor) -> bool:
    """Whether tensors have the shapes, dtypes and counts of `LayerState` and `StreamState`."""
    if seen.dtype != torch.int64 or seen.dim() != 1 or bool(((seen < 0) | (seen > _MOST)).any()):
        return False
    for layer in layers:
        taps, g, psi = layer.taps, layer.g, layer.psi
        if (taps.dim(), g.dim(), psi.dim()) != (3, 3, 5) or psi.shape[:3] != g.shape:
            return False
        if {len(taps), len(g)} != {len(seen)} or g.shape[2] != 2:
            return False
        if not taps.is_floating_point() or g.dtype != psi.dtype:
            return False
        if g.dtype not in (torch.float32, torch.float64):
            return False
    return True


def _shape(state: StreamState) -> tuple[object, ...]:
    return tuple(
        (tuple(getattr(layer, f.name).shape[1:]), getattr(layer, f.name).dtype)
        for layer in state.layers
        for f in fields(layer)
    )
