"""A small checkpoint for the tests of checkpoints and of their evaluation."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bkcore.model import LanguageModel
from bkcore.text import train_tokenizer
from tests.evaluation.helpers import TEXT


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    tokenizer = train_tokenizer(TEXT, 300)
    torch.manual_seed(0)
    LanguageModel(
        len(tokenizer), 16, 1, 32, num_experts=3, experts_per_token=1, expert_size=8
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
