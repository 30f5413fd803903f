"""Checkpoints: a model and its tokenizer in one folder, loaded and saved together."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from bkcore import manifest
from bkcore.deprecated import moved_names
from bkcore.errors import CheckpointError, InputError
from bkcore.evaluation.samples import write_samples
from bkcore.model import ResNetBKForCausalLM
from bkcore.text import load_tokenizer, tokenizer_hash
from bkcore.text.saved import CheckpointTokenizer, largest_id

__getattr__ = moved_names(__name__)


def load_checkpoint(folder: Path) -> tuple[ResNetBKForCausalLM, CheckpointTokenizer]:
    """Load a model and its tokenizer, both checked against the manifest.

    Weights saved in float16 or bfloat16 are widened, so that everything computes in float32.

    Raises:
        CheckpointError: if either is missing, damaged or not listed, or they do not belong
            together.
    """
    digests = manifest.read(folder)  # once, so that both are from the same checkpoint
    model = ResNetBKForCausalLM.from_pretrained(folder, digests=digests).eval()
    if model.dtype in (torch.float16, torch.bfloat16):
        model.float()
    tokenizer = load_tokenizer(folder, digests)
    if largest_id(tokenizer) >= model.config.vocab_size:
        raise CheckpointError(
            f"the tokenizer in {folder} has the id {largest_id(tokenizer)}, but the model has only "
            f"{model.config.vocab_size} tokens; it is the tokenizer of another model"
        )
    return model, tokenizer


def load_float(checkpoint: Path) -> tuple[ResNetBKForCausalLM, PreTrainedTokenizerFast]:
    """Load a float model and its tokenizer.

    Raises:
        InputError: if it is quantized.
        CheckpointError: if either is missing or damaged.
    """
    model, tokenizer = load_checkpoint(checkpoint)
    if model.quantization_state != "float":
        raise InputError(
            f"{checkpoint} is {model.quantization_state.value}; "
            "quantize the float checkpoint it was made from"
        )
    return model, tokenizer


def save_checkpoint(
    folder: Path,
    model: ResNetBKForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    samples: Tensor | None = None,
) -> None:
    """Save a model and its tokenizer, both or neither, replacing the model in the folder.

    Args:
        folder: where to save them.
        model, tokenizer: must belong together.
        samples: token ids (windows, length) of the training text, for later calibration.

    Raises:
        CheckpointError: if it cannot be written.
    """
    with manifest.saving_checkpoint(folder) as staged:
        model.save_pretrained(staged)
        tokenizer.save_pretrained(staged)
        if samples is not None:
            write_samples(samples, staged)


def check_tokenizers(
    tokenizer: PreTrainedTokenizerFast,
    other: PreTrainedTokenizerFast,
    folder: Path,
    reference: Path,
) -> None:
    """Raise `InputError` if two checkpoints have different tokenizers."""
    if tokenizer_hash(tokenizer) != tokenizer_hash(other):
        raise InputError(
            f"{folder} and {reference} have different tokenizers, so their tokens cannot be "
            "compared; give --reference the float model that was quantized, or one with the "
            "same tokenizer"
        )
