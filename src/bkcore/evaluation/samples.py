"""Windows of a model's training text, kept in its folder for calibration without the text."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from bkcore import manifest
from bkcore.errors import CheckpointError
from bkcore.quantization.config import CALIBRATION_TOKENS
from bkcore.reading import foreign, shown
from bkcore.text import TokenWindows, spread

_NAME = "input_ids"
_DTYPES = {"I16": torch.int16, "I32": torch.int32}
_MOST = 1 << 24
"""The most tokens accepted, more than anybody calibrates on."""


def windows_for(tokens: int, length: int) -> int:
    """How many windows of this length hold about this many tokens, at least one."""
    return max(1, tokens // length)


def samples_of(windows: TokenWindows) -> Tensor:
    """The windows that `bkcore quantize` calibrates on by default: int64 (windows, length)."""
    length = windows[0][_NAME].numel()
    return spread(windows, windows_for(CALIBRATION_TOKENS, length))


def write_samples(samples: Tensor, folder: Path) -> None:
    """Write token ids (windows, length) into a folder that `manifest.saving_checkpoint` yields."""
    dtype = torch.int16 if int(samples.max()) <= torch.iinfo(torch.int16).max else torch.int32
    save_file({_NAME: samples.to(dtype).contiguous()}, folder / manifest.SAMPLES)


def load_samples(folder: Path, vocab_size: int) -> Tensor | None:
    """Load and check the samples in a checkpoint folder; None if there are none.

    Args:
        folder: of the checkpoint.
        vocab_size: of its model.

    Returns:
        Token ids, int64 (windows, length).

    Raises:
        CheckpointError: if the file is truncated or altered, or does not hold the model's token
            ids.
    """
    digests = manifest.read(folder)
    if manifest.SAMPLES not in digests:
        return None
    path, _ = manifest.check(folder, manifest.SAMPLES, digests)
    place = folder / manifest.SAMPLES
    with foreign(str(place)), safe_open(path, framework="pt") as file:
        names = list(file.keys())
        if names != [_NAME]:
            raise CheckpointError(f"{place} holds {shown(names)} instead of {_NAME}")
        header = file.get_slice(_NAME)
        shape, dtype = tuple(header.get_shape()), header.get_dtype()
        if dtype not in _DTYPES or len(shape) != 2 or 0 in shape or shape[0] * shape[1] > _MOST:
            raise CheckpointError(
                f"{place} must hold at most {_MOST:,} token ids, int16 or int32 (windows, length), "
                f"not {shown(dtype)} {shown(shape)}"
            )
        samples: Tensor = file.get_tensor(_NAME).long()
    if int(samples.min()) < 0 or int(samples.max()) >= vocab_size:
        raise CheckpointError(
            f"the token ids in {place} go from {int(samples.min())} to {int(samples.max())}, but "
            f"the model's are in [0, {vocab_size}); they are from another tokenizer"
        )
    return samples
