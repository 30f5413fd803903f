"""A small checkpoint that several reports are made of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from bkcore.evaluation.checkpoints import load_checkpoint, save_checkpoint
from bkcore.model import LanguageModel
from bkcore.text import train_tokenizer
from tests.commands.quantizing import TRAIN, VALID

TEXT = "the slow fox sees the quick dog and the dog sees the fox. " * 600


@pytest.fixture
def fox_checkpoint(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    tokenizer = train_tokenizer(TEXT, 300)
    model = LanguageModel(len(tokenizer), 32, 1, 48, num_experts=2, expert_size=16, key_size=4)
    model.save_pretrained(tmp_path / "float")
    tokenizer.save_pretrained(tmp_path / "float")
    return tmp_path / "float"


@pytest.fixture
def fox_text(tmp_path: Path) -> Path:
    folder = tmp_path / "text"
    folder.mkdir()
    (folder / "train.txt").write_text(TEXT)
    (folder / "valid.txt").write_text(TEXT[:6000])
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the models of `checkpoint` were made for: numbered sites and foxes."""
    folder = tmp_path_factory.mktemp("text")
    (folder / "train.txt").write_text(TRAIN)
    (folder / "valid.txt").write_text(VALID)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model whose second expert is all but deaf to noise: its output is nearly zero."""
    folder = tmp_path_factory.mktemp("float")
    torch.manual_seed(0)
    tokenizer = train_tokenizer(TRAIN, 300)
    sizes: dict[str, Any] = {
        "num_experts": 2,
        "experts_per_token": 2,
        "expert_size": 24,
        "key_size": 4,
    }
    model: Any = LanguageModel(len(tokenizer), 16, 1, 32, embedding_multiplier=1.0, **sizes)
    torch.nn.init.normal_(model.layers[0].mixer.out_proj.weight, std=0.3)
    model.embedding.weight.data.mul_(20)
    model.layers[0].experts.experts[1].down.weight.data.mul_(1e-3)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def one_sided(checkpoint: Path, tmp_path: Path) -> Path:
    """The model of `checkpoint` with one expert a token, which is always the first."""
    model, tokenizer = load_checkpoint(checkpoint)
    with torch.no_grad():
        model.get_parameter("layers.0.experts.router.weight").zero_()
    model.config.experts_per_token = 1
    save_checkpoint(tmp_path / "one-sided", model, tokenizer)
    return tmp_path / "one-sided"
