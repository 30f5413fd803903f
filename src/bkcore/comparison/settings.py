"""Sizes and lengths of the comparison, in a separate file that the command imports quickly."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class LanguageSettings:
    """Settings that all contestants share.

    Attributes:
        training_tokens: the least number of tokens to train on, rounded up to whole steps.
        parameters: active parameters of each model.
    """

    training_tokens: int = 6_000_000
    vocab_size: int = 4096
    window: int = 256
    batch_size: int = 16
    width: int = 192
    layers: int = 3
    parameters: int = 2_050_000

    @property
    def steps(self) -> int:
        """Optimizer steps."""
        return math.ceil(self.training_tokens / (self.window * self.batch_size))


@dataclass(frozen=True)
class SyntheticSettings:
    """Settings that all runs share.

    Attributes:
        steps, batch_size: of training, in which no sequence is seen twice.
        test_sequences: how many other sequences accuracy is measured on.
        learning_rate: peak rate, the same for all.
        parameters: active parameters of each model.
    """

    steps: int = 1500
    batch_size: int = 32
    test_sequences: int = 1000
    learning_rate: float = 3e-3
    width: int = 64
    layers: int = 2
    parameters: int = 120_000
