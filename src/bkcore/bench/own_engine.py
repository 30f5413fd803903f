"""bkcore as `bkcore bench engines` times it: a saved model reads texts and continues them."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from bkcore.host import torch_threads
from bkcore.model import ResNetBKForCausalLM, StreamState

Tokens = npt.NDArray[np.int64]

_PIECE = 1024
"""Tokens of a text that one call reads at most: a call returns the logits of all its tokens."""


@dataclass
class Text:
    """What an engine has read of some sequences; reading and writing change it."""

    state: StreamState


class OwnEngine:
    """A saved model on some threads, by PyTorch: what `ResNetBKForCausalLM.stream` runs.

    Args:
        folder: what `save_pretrained` wrote.
        threads: threads to compute with.
    """

    def __init__(self, folder: Path, threads: int = 1) -> None:
        self._model = ResNetBKForCausalLM.from_pretrained(folder).eval()
        self._threads = threads

    def start(self, batch: int = 1) -> Text:
        """`batch` texts before their first token."""
        return Text(self._model.first_state(batch))

    def read(self, text: Text, tokens: Tokens) -> npt.NDArray[np.float32]:
        """Read tokens (B, N), N >= 1; returns the logits (B, V) after the last."""
        with torch_threads(self._threads), torch.inference_mode():
            for piece in torch.from_numpy(tokens).split(_PIECE, 1):
                output = self._model(piece, cache_params=text.state)
                text.state = output.cache_params
            return output.logits[:, -1].numpy()

    def greedy(self, text: Text, first: Tokens, steps: int) -> Tokens:
        """Read tokens (B,), then the likeliest next ones: (B, steps), of which the last is not
        read."""
        with torch_threads(self._threads), torch.inference_mode():
            stream = self._model.stream(torch.from_numpy(first)[:, None], state=text.state)
            found = []
            for token, text.state in islice(stream, steps):
                found.append(token)
            return torch.stack(found, 1).numpy()
