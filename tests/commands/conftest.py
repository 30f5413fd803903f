"""A small checkpoint that several reports are made of."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bkcore.model import LanguageModel
from bkcore.text import train_tokenizer

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
