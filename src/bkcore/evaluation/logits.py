"""Finite logits of a language model, piece by piece, so that long windows fit in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from bkcore.errors import InputError, ShapeError
from bkcore.model import ResNetBKForCausalLM

LanguageModel = Callable[[Tensor], Any]
"""Takes int64 ids (B, N) and returns logits (B, N, V), or an object with them as `.logits`."""

_CHUNK_ELEMENTS = 1 << 22


@contextmanager
def evaluating(model: LanguageModel) -> Iterator[None]:
    """Put a module into evaluation mode inside a with block, then restore the mode of each part."""
    if not isinstance(model, nn.Module):
        yield
        return
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        model.train(modes[0][1])
        for module, training in modes:
            module.training = training


def device_of(model: LanguageModel, tokens: Tensor) -> torch.device:
    """The device of a model, or that of the tokens if it has no parameters."""
    parameter = next(model.parameters(), None) if isinstance(model, nn.Module) else None
    return tokens.device if parameter is None else parameter.device


def _logits(model: LanguageModel, inputs: Tensor) -> Iterator[Tensor]:
    """Yield the logits of token ids (B, N), flattened to (B * N, V), some rows at a time."""
    if isinstance(model, ResNetBKForCausalLM):
        yield from model.iter_logits(inputs, _rows(model.config.vocab_size))
        return
    output = model(inputs)
    logits: Tensor = output if isinstance(output, Tensor) else output.logits
    if logits.ndim != 3 or logits.shape[:2] != inputs.shape:
        raise ShapeError(
            f"the model returned logits of shape {tuple(logits.shape)} for token ids of shape "
            f"{tuple(inputs.shape)}; it must return (B, N, V)"
        )
    yield from logits.flatten(0, 1).split(_rows(logits.shape[-1]))


def finite_logits(model: LanguageModel, inputs: Tensor, first_window: int) -> Iterator[Tensor]:
    """Yield the logits of token ids (B, N), flattened to (B * N, V), some rows at a time.

    Args:
        model: a module in evaluation mode, or a function.
        inputs: int64 (B, N).
        first_window: number of the first row, for error messages.

    Raises:
        InputError: if a logit is not finite.
        ShapeError: if they are not (B, N, V).
    """
    done = 0
    for logits in _logits(model, inputs):
        if not torch.stack(torch.aminmax(logits)).isfinite().all():
            row, entry = (~logits.isfinite()).nonzero()[0].tolist()
            window, position = divmod(done + row, inputs.shape[1])
            raise InputError(
                f"the model returned the logit {float(logits[row, entry])} in window "
                f"{first_window + window} at position {position} for token {entry}; "
                "logits must be finite; did its training diverge?"
            )
        done += len(logits)
        yield logits


def check_vocabulary(ids: Tensor, vocabulary: int) -> None:
    """Raise `InputError` if ids are not in [0, vocabulary)."""
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocabulary:
        raise InputError(
            f"the token ids go from {low} to {high}, but the model's go from 0 to "
            f"{vocabulary - 1}; encode the text with the model's tokenizer"
        )


def _rows(vocabulary: int) -> int:
    """How many positions to process at once, so that logits (rows, V) stay small in memory."""
    return max(1, _CHUNK_ELEMENTS // vocabulary)
