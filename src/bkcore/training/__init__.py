"""Training of language models."""

from bkcore.training.trainer import Schedule, train

__all__ = ["Schedule", "train"]
