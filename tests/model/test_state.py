"""States: of one size, never changed, saved and batched."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from bkcore.errors import CheckpointError, InputError
from bkcore.model import StreamState
from tests.model.helpers import read, too_full


def same(one: StreamState, other: StreamState) -> bool:
    fields = [f.name for f in dataclasses.fields(one.layers[0])]
    pairs = zip(one.layers, other.layers, strict=True)
    equal = [torch.equal(getattr(a, n), getattr(b, n)) for a, b in pairs for n in fields]
    return all(equal) and torch.equal(one.seen, other.seen)


@torch.no_grad()
def test_a_state_has_one_size(build, tokens):
    model = build()

    def size(state: StreamState) -> int:
        return sum(x.numel() for layer in state.layers for x in vars(layer).values())

    sizes = [size(read(model, tokens(1, n), [])[1]) for n in (1, 2, 100)]
    assert sizes == [size(model.first_state())] * 3


@torch.no_grad()
def test_states_are_saved_batched_and_reordered(build, tokens, tmp_path):
    model = build()
    texts = [tokens(1, n) for n in (3, 17, 8)]
    states = [read(model, text, [])[1] for text in texts]
    states.append(model.first_state())
    for n, state in enumerate(states):
        state.save(tmp_path / f"{n}.safetensors")
    batch = StreamState.batch([StreamState.load(tmp_path / f"{n}.safetensors") for n in range(4)])
    assert batch.seen.tolist() == [3, 17, 8, 0]
    assert same(batch, StreamState.batch(states))
    for wrong in (4, -1):
        with pytest.raises(InputError, match=f"rows \\[0, {wrong}\\] must be in \\[0, 4\\)"):
            batch.select(torch.tensor([0, wrong]))
    order = torch.tensor([2, 0, 0, 3, 1])
    later = tokens(5, 6)
    together, after = read(model, later, [2], batch.select(order))
    assert after.seen.tolist() == [14, 9, 9, 6, 23]
    for row, place in enumerate(order.tolist()):
        alone, _ = read(model, later[row : row + 1], [], states[place])
        torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_state_is_not_changed_by_reading_on(build, tokens):
    model = build()
    _, state = read(model, tokens(1, 5), [])
    before = StreamState.batch([state])
    read(model, tokens(1, 9), [4], state)
    assert same(state, before)


@pytest.mark.parametrize(
    "change",
    [
        {"seen": None},
        {"seen": torch.zeros(2)},
        {"seen": torch.tensor([-1, 0])},
        {"seen": torch.tensor([0, 2**62 + 1])},
        {"seen": torch.zeros(3, dtype=torch.int64)},
        {"0.g": None},
        {"0.g": torch.zeros(2, 4)},
        {"0.taps": torch.zeros(2, 3, 4, dtype=torch.int32)},
        {"0.psi": torch.zeros(1)},
        {"999999999.g": torch.zeros(1)},
        {"more": torch.zeros(1)},
    ],
)
def test_a_state_that_is_none(
    build: Any, tokens: Any, tmp_path: Path, change: dict[str, Any]
) -> None:
    path = tmp_path / "state"
    build()(tokens(2, 5), use_cache=True).cache_params.save(path)
    tensors = {k: v for k, v in {**load_file(path), **change}.items() if v is not None}
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match="is not a saved state"):
        StreamState.load(path)


def test_a_pipe_is_no_state(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "state")
    with pytest.raises(CheckpointError, match="not a regular file"):
        StreamState.load(tmp_path / "state")


def test_a_state_on_a_full_disk(
    build: Any, tokens: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state: StreamState = build()(tokens(1, 3), use_cache=True).cache_params
    monkeypatch.setattr("bkcore.model.state.save_file", too_full)
    with pytest.raises(CheckpointError, match="No space left"):
        state.save(tmp_path / "state")
    assert not list(tmp_path.iterdir())
