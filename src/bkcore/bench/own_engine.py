"""bkcore as `bkcore bench engines` times it: a saved model reads texts and continues them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from bkcore_runtime import Engine, State

Tokens = npt.NDArray[np.int64]
Text = State


class OwnEngine:
    """A saved model on some threads, by `bkcore_runtime.Engine`.

    Args:
        folder: what `save_pretrained` wrote.
        threads: threads to compute with.
    """

    def __init__(self, folder: Path, threads: int = 1) -> None:
        self._engine = Engine(folder, threads=threads)

    def start(self, batch: int = 1) -> Text:
        """`batch` texts before their first token."""
        return self._engine.start(batch)

    def read(self, text: Text, tokens: Tokens) -> npt.NDArray[np.float32]:
        """Read tokens (B, N), N >= 1; returns the logits (B, V) after the last."""
        return self._engine.read(text, tokens)

    def greedy(self, text: Text, first: Tokens, steps: int) -> Tokens:
        """Read tokens (B,), then the likeliest next ones: (B, steps), of which the last is not
        read."""
        if len(first) == 1:
            made = self._engine.generate(first, steps, stop=(), state=text)
            return np.fromiter(made, np.int64, steps)[None]
        found = np.empty((len(first), steps), np.int64)
        for step in range(steps):
            first = self._engine.read(text, first[:, None]).argmax(1)
            found[:, step] = first
        return found
