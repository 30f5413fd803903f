"""The text for quantizing a checkpoint: windows to calibrate on, to hold out, and to train on.

It is training text, never the text that models are evaluated on.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from bkcore.errors import InputError
from bkcore.evaluation.evaluate import Scorer, batch_of
from bkcore.evaluation.samples import load_samples, windows_for
from bkcore.model import ResNetBKForCausalLM
from bkcore.text import (
    TokenWindows,
    encode,
    is_part_of,
    load_split,
    spread,
    warning_of_other_text,
)

_SENSITIVITY_TOKENS = 8192


class CalibrationText(NamedTuple):
    """The text for quantizing a checkpoint: a whole text, or samples of one.

    Attributes:
        name: of the text.
        content: all of it; empty if there are samples.
        samples: token ids (windows, length).
        warning: set if the model was not trained on this text, else None.
    """

    name: str
    content: str
    samples: Tensor | None
    warning: str | None

    def tokens(self, tokenizer: PreTrainedTokenizerFast) -> Tensor:
        """Token ids (tokens,)."""
        ids = encode(tokenizer, self.content) if self.samples is None else self.samples
        return ids.flatten()


def calibration_text(
    checkpoint: Path,
    model: ResNetBKForCausalLM,
    data: str | Path | None,
    more: bool,
) -> CalibrationText:
    """The text named by `data`, or what the checkpoint itself provides.

    Args:
        checkpoint: its folder.
        model: the model in it.
        data: as in `bkcore.text.load_split`; None takes the samples of its training text in the
            checkpoint, or the embedded corpus if the model was trained on that.
        more: whether more text is needed than the samples.

    Raises:
        DataError: as in `bkcore.text.load_split`.
        InputError: if `data` is None and what the checkpoint provides is not enough.
    """
    origin = model.config.training_text
    if data is not None:
        name, content = load_split(data, "train")
        warning = warning_of_other_text(origin, data, name, "train", content)
        return CalibrationText(name, content, None, warning)
    samples = load_samples(checkpoint, model.config.vocab_size)
    if origin is not None and samples is not None and not more:
        return CalibrationText(f"{origin['name']}, samples in the checkpoint", "", samples, None)
    name, content = load_split(None, "train")
    if is_part_of(origin, "train", content):
        return CalibrationText(name, content, None, None)
    known = "does not say what it was trained on"
    if origin is not None:
        known = f"was trained on {origin['name']}"
        if samples is not None:
            known += f" and holds only {samples.numel():,} tokens of it, but this takes more"
    raise InputError(f"the model in {checkpoint} {known}; name its text with --data")


@dataclass(frozen=True)
class CalibrationWindows:
    """Windows of a text, and what each is used for.

    Attributes:
        all: the windows.
        wanted: tokens to calibrate on; at least one window is taken.
        bos_id: the token before the first one of a text.
    """

    all: TokenWindows
    wanted: int
    bos_id: int

    @property
    def length(self) -> int:
        """Tokens per window."""
        return self.all[0]["input_ids"].numel()

    @property
    def batch_size(self) -> int:
        """Windows per batch."""
        return batch_of(self.length)

    @property
    def _count(self) -> int:
        return windows_for(self.wanted, self.length)

    def batches(self) -> tuple[Tensor, ...]:
        """Batches to calibrate on: token ids (B, length), spread over the text."""
        return spread(self.all, self._count).split(self.batch_size)

    def for_sensitivity(self) -> tuple[Tensor, ...]:
        """About 8,192 tokens of `batches`, in batches."""
        ids = torch.cat(self.batches())
        return ids[:: max(1, ids.numel() // _SENSITIVITY_TOKENS)].split(self.batch_size)

    def scorer(self) -> Scorer:
        """It scores models on as many windows as calibration takes, but different ones."""
        held_out = spread(self.all, self._count, self._count)
        return Scorer(held_out.flatten(), self.length, self.batch_size, self.bos_id)
