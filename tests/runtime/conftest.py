"""Checkpoints for the engine, and the models that they were saved from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from bkcore.model import ResNetBKForCausalLM
from bkcore.text import train_tokenizer
from bkcore_runtime import Engine, State, Tokenizer, load
from tests.model.conftest import EXECUTED, VOCABULARY, build, seed, tokens

__all__ = ["READ", "VOCABULARY", "Save", "Saved", "build", "cut", "draw", "same", "seed", "tokens"]

READ = [form for form in EXECUTED if form[1] != "training"]
"""The modes and states that the engine reads."""

SHIPPED = Path(__file__).resolve().parents[2] / "checkpoints" / "wikitext2"

TEXT = "the slow fox sees the quick dog, and the dog's owner – Zoë – sees 狐狸 and 🦊. " * 200


class Saved(NamedTuple):
    model: ResNetBKForCausalLM
    folder: Path


Save = Callable[..., Saved]


def draw(batch: int, length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCABULARY, (batch, length))


def cut(engine: Engine, ids: np.ndarray, cuts: list[int]) -> tuple[np.ndarray, State]:
    """Logits after ids that are read in pieces."""
    state = engine.start(len(ids))
    for piece in np.split(ids, cuts, 1):
        logits = engine.read(state, piece)
    return logits, state


def same(first: State, second: State) -> bool:
    pairs = zip(first.layers, second.layers, strict=True)
    return (first.seen == second.seen).all() and all(
        np.array_equal(*fields) for layers in pairs for fields in zip(*layers, strict=True)
    )


@pytest.fixture
def save(build, tmp_path: Path) -> Save:
    """save(mode, state, **options) builds a model and saves it."""

    def save(mode: str | None = None, state: str = "float", **options: object) -> Saved:
        model = build(mode, state, **options)
        folder = tmp_path / f"{mode}-{state}-{len(list(tmp_path.iterdir()))}"
        model.save_pretrained(folder)
        return Saved(model, folder)

    return save


@pytest.fixture(params=READ, ids=lambda form: f"{form[0]}-{form[1]}")
def saved(request: pytest.FixtureRequest, save: Save) -> Saved:
    """A model in every mode that the engine reads."""
    return save(*request.param)


@pytest.fixture
def whole(save: Save) -> Path:
    """A small model with a tokenizer of 300 tokens, among them parts of characters."""
    tokenizer = train_tokenizer(TEXT, 300)
    folder = save(vocab_size=len(tokenizer)).folder
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def shipped() -> tuple[Engine, Tokenizer]:
    """The checkpoint in the repository."""
    return load(SHIPPED)
