"""Samples of the training text in a checkpoint's folder: listed, checked, and the model's own."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from bkcore import manifest
from bkcore.errors import CheckpointError
from bkcore.evaluation.checkpoints import load_checkpoint, save_checkpoint
from bkcore.evaluation.samples import load_samples, samples_of
from bkcore.model import LanguageModel
from bkcore.text import TokenWindows, list_tokenizer, load_tokenizer, train_tokenizer

VOCAB = 300
SAMPLES = torch.arange(4 * 16).view(4, 16) % VOCAB


def save(folder: Path, samples: Tensor | None) -> None:
    tokenizer = train_tokenizer("a text of a few words " * 40, VOCAB)
    sizes: dict[str, Any] = {"num_experts": 2, "expert_size": 8, "key_size": 4, "num_heads": 2}
    save_checkpoint(folder, LanguageModel(VOCAB, 8, 1, 16, **sizes), tokenizer, samples)


def test_they_come_back_as_they_went(tmp_path: Path) -> None:
    save(tmp_path, SAMPLES)
    found = load_samples(tmp_path, VOCAB)
    assert found is not None
    assert found.dtype == torch.int64
    assert torch.equal(found, SAMPLES)
    load_checkpoint(tmp_path)  # which does not mind them


def test_they_go_with_the_model_that_they_are_of(tmp_path: Path) -> None:
    save(tmp_path, SAMPLES)
    save(tmp_path, None)
    assert load_samples(tmp_path, VOCAB) is None
    assert not (tmp_path / manifest.SAMPLES).exists()


def test_they_stay_with_the_tokenizer_that_made_them(tmp_path: Path) -> None:
    save(tmp_path, SAMPLES)
    load_tokenizer(tmp_path).save_pretrained(tmp_path)
    list_tokenizer(tmp_path)
    assert torch.equal(load_samples(tmp_path, VOCAB), SAMPLES)  # type: ignore[arg-type]
    train_tokenizer("another text " * 40, VOCAB).save_pretrained(tmp_path)
    assert load_samples(tmp_path, VOCAB) is None
    assert not (tmp_path / manifest.SAMPLES).exists()


def test_another_model_does_not_take_them_over(tmp_path: Path) -> None:
    save(tmp_path, SAMPLES)
    size = manifest.model_bytes(tmp_path)
    model, _ = load_checkpoint(tmp_path)
    model.save_pretrained(tmp_path)
    assert load_samples(tmp_path, VOCAB) is None
    assert not (tmp_path / manifest.SAMPLES).exists()
    assert manifest.model_bytes(tmp_path) == size
    load_checkpoint(tmp_path)


def test_a_file_of_that_name_which_nobody_listed(tmp_path: Path) -> None:
    (tmp_path / manifest.SAMPLES).write_text("mine")
    save(tmp_path, None)
    assert load_samples(tmp_path, VOCAB) is None
    assert (tmp_path / manifest.SAMPLES).read_text() == "mine"


def test_as_many_are_kept_as_calibration_takes() -> None:
    windows = TokenWindows(torch.arange(100_000), 1024)
    assert samples_of(windows).shape == (32, 1024)
    assert samples_of(TokenWindows(torch.arange(50), 16)).shape == (3, 16)
    assert samples_of(TokenWindows(torch.arange(100_000), 50_000)).shape == (1, 50_000)


def test_large_vocabularies_keep_their_ids(tmp_path: Path) -> None:
    ids = torch.tensor([[0, 32_768, 100_000]])
    save(tmp_path, ids)
    assert torch.equal(load_samples(tmp_path, 100_001), ids)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        ({"input_ids": SAMPLES.float()}, "token ids, int16 or int32"),
        ({"input_ids": SAMPLES.to(torch.int32).flatten()}, "token ids, int16 or int32"),
        ({"input_ids": torch.zeros(0, 4, dtype=torch.int32)}, "token ids, int16 or int32"),
        ({"input_ids": -SAMPLES.to(torch.int16)}, "from another tokenizer"),
        ({"input_ids": VOCAB + SAMPLES.to(torch.int16)}, "from another tokenizer"),
        ({"labels": SAMPLES.to(torch.int16)}, "instead of input_ids"),
    ],
)
def test_what_is_no_sample_is_refused(
    tmp_path: Path, tensors: dict[str, Tensor], reason: str
) -> None:
    save(tmp_path, SAMPLES)
    save_file(tensors, tmp_path / manifest.SAMPLES)
    path = tmp_path / manifest.MANIFEST
    content = json.loads(path.read_text())
    digest = hashlib.sha256((tmp_path / manifest.SAMPLES).read_bytes()).hexdigest()
    content["sha256"][manifest.SAMPLES] = digest
    path.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=reason):
        load_samples(tmp_path, VOCAB)


@pytest.mark.parametrize("damage", [lambda x: x[:-1], lambda x: x[:-1] + b"?", lambda x: b""])
def test_damage_is_seen(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    save(tmp_path, SAMPLES)
    path = tmp_path / manifest.SAMPLES
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(CheckpointError, match="truncated or altered"):
        load_samples(tmp_path, VOCAB)
