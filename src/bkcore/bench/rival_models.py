"""transformers' GPT-2 and Mamba as alternatives a user might run: float32 and dynamic INT8."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedModel,
)
from transformers.pytorch_utils import Conv1D

from bkcore.bench.timing import Call

Model = TypeVar("Model", bound=PreTrainedModel)

_WIDTH = 256
_BEGINNING = 64

_UNREADY = ("dt_proj", "lm_head")
"""Mamba's layers whose float weight transformers reads directly."""


@dataclass(frozen=True)
class LanguageRival:
    """A model with random weights.

    Attributes:
        name: its usual name.
        models: "float32" and "INT8", which is PyTorch's dynamic quantization of linear layers.
        parameters: their total number.
        order: the time of a prefill grows with this power of the context.
    """

    name: str
    models: dict[str, PreTrainedModel]
    parameters: int
    order: int


def build(parameters: int, vocabulary: int, context: int) -> list[LanguageRival]:
    """The rivals with about `parameters` parameters, up to one layer, and room for a context."""
    tokens: dict[str, Any] = {"vocab_size": vocabulary, "bos_token_id": 0, "eos_token_id": 0}

    def gpt2(layers: int) -> PreTrainedModel:
        heads, positions = _WIDTH // 64, context + 1
        return GPT2LMHeadModel(
            GPT2Config(n_layer=layers, n_embd=_WIDTH, n_head=heads, n_positions=positions, **tokens)
        )

    def mamba(layers: int) -> PreTrainedModel:
        return MambaForCausalLM(
            MambaConfig(num_hidden_layers=layers, hidden_size=_WIDTH, pad_token_id=0, **tokens)
        )

    return [_rival("GPT-2", gpt2, parameters, 2), _rival("Mamba", mamba, parameters, 1)]


def _rival(
    name: str, make: Callable[[int], PreTrainedModel], parameters: int, order: int
) -> LanguageRival:
    torch.manual_seed(0)
    model = of_size(make, parameters).eval()
    models = {"float32": model, "INT8": _dynamic_int8(model)}
    return LanguageRival(name, models, count_parameters(model), order)


def of_size(make: Callable[[int], Model], parameters: int) -> Model:
    """The model with the number of layers, or of other equal parts, that comes closest to
    `parameters`."""
    with torch.device("meta"):
        one, two = (count_parameters(make(parts)) for parts in (1, 2))
    return make(max(1, 1 + round((parameters - one) / (two - one))))


def count_parameters(model: nn.Module) -> int:
    """How many numbers a model learns."""
    return sum(parameter.numel() for parameter in model.parameters())


def _dynamic_int8(model: PreTrainedModel) -> PreTrainedModel:
    model = deepcopy(model)
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, Conv1D):  # dynamic quantization would skip it
                linear = nn.Linear(*child.weight.shape)
                linear.weight.data, linear.bias.data = child.weight.data.t(), child.bias.data
                setattr(module, name, linear)
    is_mamba = isinstance(model, MambaForCausalLM)
    names = {
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not (is_mamba and name.endswith(_UNREADY))
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, but the only one on CPUs
        quantized: PreTrainedModel = torch.ao.quantization.quantize_dynamic(model, names)
    return quantized


def prefill(model: PreTrainedModel, text: Tensor) -> Call:
    """A call that reads a text (1, N) and keeps the state after it."""
    return partial(model, text, use_cache=True)


def decoder(model: PreTrainedModel, text: Tensor, token: Tensor) -> Call:
    """A call that reads one more token of each sequence (B, 1) after a text (B, N), repeatably.

    Mamba's state has a fixed size and its plain scan is slow, so it reads only the beginning of the
    text.
    """
    if isinstance(model, MambaForCausalLM):
        state = model(text[:, :_BEGINNING], use_cache=True).cache_params
        return partial(model, token, cache_params=state, use_cache=True)
    cache = model(text, use_cache=True, logits_to_keep=1).past_key_values

    def decode() -> object:
        found = model(token, past_key_values=cache, use_cache=True)
        cache.crop(-1)
        return found

    return decode
