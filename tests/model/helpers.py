"""What the tests of several modules do with a model."""

from __future__ import annotations

import errno
import hashlib
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from torch import Tensor

from bkcore.errors import CheckpointError
from bkcore.manifest import MANIFEST
from bkcore.model import ResNetBKForCausalLM, StreamState

TRAINABLE = [(None, "float"), ("qat_int8", "training"), ("qat_int4", "training")]


def gradients(model, **inputs) -> dict[str, Tensor]:
    """Gradients of the loss, by the names of the parameters."""
    model.zero_grad()
    model(**inputs).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def read(model, ids: Tensor, cuts: list[int], state=None) -> tuple[Tensor, StreamState]:
    """Logits of ids read in pieces that end at the cuts."""
    pieces = []
    for start, end in zip([0, *cuts], [*cuts, ids.shape[1]], strict=True):
        output = model(ids[:, start:end], cache_params=state, use_cache=True)
        pieces.append(output.logits)
        state = output.cache_params
    return torch.cat(pieces, 1), state


def full(*args: Any, **kwargs: Any) -> None:
    """Fail as a full disk does."""
    raise OSError(errno.ENOSPC, "No space left on device")


def too_full(*args: Any, **kwargs: Any) -> None:
    """Fail as safetensors does on a full disk."""
    raise SafetensorError("Error while serializing: No space left on device (os error 28)")


def expected_bits(mode: str, part: str) -> int:
    """Bits that a mode gives to a part: "core", "expert" or "head"."""
    if mode == "mixed_precision":
        return {"core": 8, "expert": 4, "head": 16}[part]
    return 4 if mode.endswith("int4") else 8


def sign(folder: Path, **more: str) -> None:
    """Make the manifest right again, and have it list what else is named."""
    content = json.loads((folder / MANIFEST).read_text())
    for name in content["sha256"]:
        content["sha256"][name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    content["sha256"].update(more)
    (folder / MANIFEST).write_text(json.dumps(content))


def edit(folder: Path, file: str = "config.json", **fields: Any) -> None:
    """Change fields of a JSON file, and have the manifest list what is there."""
    content = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({**content, **fields}))
    sign(folder)


def refused(folder: Path, match: str, **options: Any) -> None:
    """Loading fails in words, and at once."""
    start = time.process_time()
    with pytest.raises(CheckpointError, match=match):
        ResNetBKForCausalLM.from_pretrained(folder, **options)
    assert time.process_time() - start < 2
