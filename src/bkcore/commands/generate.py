"""`bkcore generate`: continue a text."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from bkcore.commands.options import SHIPPED
from bkcore.commands.running import start_work, use_free_cores
from bkcore.display.console import Console, say
from bkcore.errors import CheckpointError, UnsupportedError
from bkcore_runtime import manifest
from bkcore_runtime.reading import foreign, parse_json, shown

_TOP_K = 50
"""Likeliest tokens that transformers draws from, unless a checkpoint says otherwise."""

_HONOURED: dict[str, tuple[type, ...]] = {
    "top_k": (int,),
    **dict.fromkeys(("top_p", "min_p", "repetition_penalty"), (int, float)),
}
_WITHOUT_EFFECT = {
    *("bos_token_id", "eos_token_id", "pad_token_id", "temperature", "do_sample", "use_cache"),
    *("max_length", "max_new_tokens", "transformers_version", "_from_model_config"),
    *("output_attentions", "output_hidden_states", "output_scores", "return_dict_in_generate"),
}
"""Fields of a generation configuration that the command's options replace, that the engine reads
itself, or that change no text."""


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
    try:
        whole = continue_text(checkpoint, text, tokens, temperature, seed)
    except UnsupportedError as error:
        say(Console(stderr=True), f"{error}; computing with PyTorch")
        start_work()
        use_free_cores()
        whole = continue_with_pytorch(checkpoint, text, tokens, temperature, seed)
    print(whole)


def _as_text(argument: str) -> str:
    """A UTF-8 argument as text, even if Python decoded it by another locale."""
    try:
        return os.fsencode(argument).decode()
    except UnicodeError:
        return argument


def continue_text(checkpoint: Path, prompt: str, tokens: int, temperature: float, seed: int) -> str:
    """The prompt followed by up to `tokens` sampled tokens, by the engine of `bkcore_runtime`.

    Args:
        checkpoint: folder with a model and its tokenizer.
        prompt: at least one character.
        tokens: the most to add, at least 1.
        temperature: 0 always takes the likeliest token.
        seed: of the sampling.

    Raises:
        InputError: if the prompt is empty, or contains lone surrogates.
        CheckpointError: if the checkpoint cannot be loaded.
        UnsupportedError: if the engine does not read it.
    """
    from bkcore_runtime import loading
    from bkcore_runtime.tokenizer import check_text

    check_text(prompt)
    filters = _filters(checkpoint)
    engine, tokenizer = loading.load(checkpoint)
    ids = tokenizer.encode(prompt)
    made = engine.generate(ids, tokens, temperature=temperature, seed=seed, **filters)
    return tokenizer.decode([*ids, *made])


def continue_with_pytorch(
    checkpoint: Path, prompt: str, tokens: int, temperature: float, seed: int
) -> str:
    """The same by PyTorch, for all checkpoints."""
    from bkcore.evaluation.checkpoints import load_checkpoint

    model, tokenizer = load_checkpoint(checkpoint)
    return sample(model, tokenizer, prompt, tokens, temperature, seed)


def _filters(checkpoint: Path) -> dict[str, Any]:
    """How transformers would filter the tokens to draw from.

    Raises:
        CheckpointError: if a field of the file is no number.
        UnsupportedError: if it would do more than the engine can.
    """
    digests = manifest.read(checkpoint)
    fields: dict[str, Any] = {}
    if manifest.GENERATION in digests:
        content = manifest.contents(checkpoint, manifest.GENERATION, digests)
        with foreign(str(checkpoint / manifest.GENERATION)):
            fields = {name: x for name, x in parse_json(content).items() if x is not None}
    honoured = {name: fields[name] for name in _HONOURED if name in fields}
    for name, value in honoured.items():
        if type(value) not in _HONOURED[name]:
            place = checkpoint / manifest.GENERATION
            raise CheckpointError(f"{name} in {place} cannot be {shown(value)}")
    more = sorted(fields.keys() - _WITHOUT_EFFECT - _HONOURED.keys())
    if more:
        raise UnsupportedError(
            f"the engine does not follow {', '.join(more)} in {checkpoint / manifest.GENERATION}"
        )
    return {"top_k": _TOP_K} | honoured


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
