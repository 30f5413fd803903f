"""The engine that is timed gives what the model gives."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import pytest
import torch

from bkcore.bench.own_engine import OwnEngine
from bkcore.bench.random_models import random_model
from bkcore.model import ResNetBKForCausalLM


@pytest.fixture(scope="module")
def model() -> ResNetBKForCausalLM:
    return random_model(vocab_size=40, d_model=16, n_layers=2, expert_size=16, key_size=4)


@pytest.fixture
def engine(model: ResNetBKForCausalLM, tmp_path: Path) -> OwnEngine:
    model.save_pretrained(tmp_path)
    return OwnEngine(tmp_path, threads=2)


def test_a_text_is_read_on(model: ResNetBKForCausalLM, engine: OwnEngine) -> None:
    tokens = torch.randint(40, (2, 11))
    text = engine.start(2)
    engine.read(text, tokens[:, :1].numpy())
    found = engine.read(text, tokens[:, 1:].numpy())
    assert found.shape == (2, 40)
    torch.testing.assert_close(torch.from_numpy(found), model(tokens).logits[:, -1].detach())
    assert text.seen.tolist() == [11, 11]


def test_it_writes_what_the_stream_writes(model: ResNetBKForCausalLM, engine: OwnEngine) -> None:
    tokens = torch.randint(40, (3, 5))
    text = engine.start(3)
    engine.read(text, tokens[:, :4].numpy())
    found = engine.greedy(text, tokens[:, 4].numpy(), 6)
    expected = [token for token, _ in islice(model.stream(tokens), 6)]
    assert torch.equal(torch.from_numpy(found), torch.stack(expected, 1))
    assert text.seen.tolist() == [10] * 3
    again = engine.greedy(text, found[:, -1], 2)  # it goes on where it was
    more = [token for token, _ in islice(model.stream(tokens), 8)]
    assert torch.equal(torch.from_numpy(again), torch.stack(more[6:], 1))
