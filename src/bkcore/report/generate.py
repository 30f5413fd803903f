"""Continuing a text."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch

from bkcore.errors import InputError
from bkcore.evaluation.checkpoints import load_checkpoint


def continue_text(checkpoint: Path, prompt: str, tokens: int, temperature: float, seed: int) -> str:
    """The prompt and up to `tokens` sampled tokens.

    Args:
        checkpoint: folder with a model and its tokenizer.
        prompt: at least one character.
        tokens: how many to add at most, at least 1.
        temperature: 0 takes the likeliest token each time.
        seed: of the sampling.

    Raises:
        InputError: if the prompt is empty, or holds lone surrogates.
        CheckpointError: if the checkpoint cannot be loaded.
    """
    if not prompt:
        raise InputError("the prompt is empty; give at least one character")
    if any("\ud800" <= character <= "\udfff" for character in prompt):
        raise InputError(f"the prompt {prompt!r} is not text in UTF-8")
    model, tokenizer = load_checkpoint(checkpoint)
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    torch.manual_seed(seed)
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {}
    out = cast(Any, model).generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=tokens,
        pad_token_id=tokenizer.eos_token_id,
        **sampling,
    )
    return str(tokenizer.decode(out[0], skip_special_tokens=True))
