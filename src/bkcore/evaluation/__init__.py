"""Measuring language models: perplexity with its protocol, and paired comparisons."""

from bkcore.deprecated import moved_module

moved_module("bkcore.evaluation.checkpoints", "bkcore.evaluation.judging")
