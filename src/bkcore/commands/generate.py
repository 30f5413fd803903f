"""`bkcore generate`: continue a text."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from bkcore import manifest
from bkcore.commands.options import SHIPPED
from bkcore.commands.running import start_work, use_free_cores
from bkcore.errors import InputError


def generate(
    checkpoint: Annotated[
        Path, typer.Argument(help="Checkpoint folder; default: the one in the repository.")
    ] = SHIPPED,
    prompt: Annotated[str, typer.Option(help="Text to continue.")] = "The ",
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to add.")] = 60,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest.")] = 0.8,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
) -> None:
    """Continue a text with a checkpoint."""
    text = _as_text(prompt)
    check_prompt(text)
    manifest.read(checkpoint)
    start_work()
    use_free_cores()
    print(continue_text(checkpoint, text, tokens, temperature, seed))


def _as_text(argument: str) -> str:
    """A UTF-8 argument as text, even if Python decoded it by another locale."""
    try:
        return os.fsencode(argument).decode()
    except UnicodeError:
        return argument


def continue_text(checkpoint: Path, prompt: str, tokens: int, temperature: float, seed: int) -> str:
    """The prompt followed by up to `tokens` sampled tokens.

    Args:
        checkpoint: folder with a model and its tokenizer.
        prompt: at least one character.
        tokens: the most to add, at least 1.
        temperature: 0 always takes the likeliest token.
        seed: of the sampling.

    Raises:
        InputError: if the prompt is empty, or contains lone surrogates.
        CheckpointError: if the checkpoint cannot be loaded.
    """
    from bkcore.evaluation.checkpoints import load_checkpoint

    check_prompt(prompt)
    model, tokenizer = load_checkpoint(checkpoint)
    return sample(model, tokenizer, prompt, tokens, temperature, seed)


def check_prompt(prompt: str) -> None:
    """Raise `InputError` if a prompt is empty, or contains lone surrogates."""
    if not prompt:
        raise InputError("the prompt is empty; give at least one character")
    if any("\ud800" <= character <= "\udfff" for character in prompt):
        raise InputError(f"the prompt {prompt!r} is not valid UTF-8 text")


def sample(
    model: Any, tokenizer: Any, prompt: str, tokens: int, temperature: float = 0.0, seed: int = 0
) -> str:
    """The prompt followed by up to `tokens` sampled tokens of a model, as in `continue_text`."""
    import torch

    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    torch.manual_seed(seed)
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {}
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=tokens,
        pad_token_id=tokenizer.eos_token_id,
        **sampling,
    )
    return str(tokenizer.decode(out[0], skip_special_tokens=True))
