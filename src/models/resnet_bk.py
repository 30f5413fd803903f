"""The language model under its first import path."""

from bkcore.model import LanguageModel, ResNetBKConfig, ResNetBKForCausalLM  # noqa: F401
