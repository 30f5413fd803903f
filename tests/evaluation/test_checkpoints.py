"""A model and its tokenizer in one folder: they are loaded and saved together, or not at all."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from bkcore import manifest
from bkcore.errors import CheckpointError
from bkcore.evaluation.checkpoints import load_checkpoint, save_checkpoint
from bkcore.model import LanguageModel
from bkcore.text import load_tokenizer, tokenizer_hash, train_tokenizer
from tests.evaluation.helpers import TEXT, full


def test_the_tokenizer_must_be_the_listed_one(checkpoint: Path, tmp_path: Path) -> None:
    """Also one of the same size: every id would mean another word."""
    folder = tmp_path / "model"
    shutil.copytree(checkpoint, folder)
    other = train_tokenizer(TEXT[::-1], 300)
    other.save_pretrained(tmp_path / "other")
    shutil.copy(tmp_path / "other" / "tokenizer.json", folder / "tokenizer.json")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json was truncated or altered"):
        load_checkpoint(folder)


def test_a_folder_of_an_older_version_is_told_what_to_do(checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(checkpoint, folder)
    content = json.loads((folder / manifest.MANIFEST).read_text())
    for name in manifest.TOKENIZER_FILES:
        content["sha256"].pop(name, None)
    (folder / manifest.MANIFEST).write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"call bkcore\.text\.list_tokenizer\(folder\)"):
        load_checkpoint(folder)
    manifest.list_tokenizer(folder)
    load_checkpoint(folder)


def test_a_tokenizer_with_more_tokens_than_the_model(tmp_path: Path) -> None:
    LanguageModel(270, 16, 1, 32, num_experts=2, expert_size=8).save_pretrained(tmp_path)
    train_tokenizer(TEXT, 280).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="it is the tokenizer of another model"):
        load_checkpoint(tmp_path)


def test_both_are_saved_or_none(checkpoint: Path, tmp_path: Path, monkeypatch: Any) -> None:
    folder = tmp_path / "model"
    shutil.copytree(checkpoint, folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    tokenizer = train_tokenizer(TEXT[::-1], 290)
    model = LanguageModel(len(tokenizer), 16, 1, 32, num_experts=2, expert_size=8)

    with monkeypatch.context() as patch:
        patch.setattr(type(tokenizer), "_save_pretrained", full)
        with pytest.raises(CheckpointError, match="No space left"):
            save_checkpoint(folder, model, tokenizer)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    save_checkpoint(folder, model, tokenizer)
    loaded, again = load_checkpoint(folder)
    name = "embedding.weight"
    assert torch.equal(loaded.get_parameter(name), model.get_parameter(name))
    assert tokenizer_hash(again) == tokenizer_hash(tokenizer)
    assert manifest.verify(folder).keys() == {path.name for path in folder.iterdir()} - {
        manifest.MANIFEST
    }


def test_a_save_in_between_mixes_nothing(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(checkpoint, folder)
    tokenizer = train_tokenizer(TEXT[::-1], 290)
    other = LanguageModel(len(tokenizer), 16, 1, 32, num_experts=2, expert_size=8)

    def load_later(*arguments: Any) -> Any:
        save_checkpoint(folder, other, tokenizer)
        return load_tokenizer(*arguments)

    monkeypatch.setattr("bkcore.evaluation.checkpoints.load_tokenizer", load_later)
    with pytest.raises(CheckpointError, match="was truncated or altered"):
        load_checkpoint(folder)
