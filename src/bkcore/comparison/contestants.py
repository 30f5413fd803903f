"""The models to compare, each with one size left open so that all can be made equally large."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedModel,
)

from bkcore.errors import InputError
from bkcore.model import LanguageModel
from bkcore.model.moe import MixtureOfExperts

_BOUND = 0.0147
"""Largest relative deviation from the wanted number; 1.0147 / 0.9853 is below 1.03."""

_LARGEST = 1 << 13
"""The largest open size to try."""


@dataclass(frozen=True)
class Frame:
    """The sizes that all contestants of one comparison share.

    Attributes:
        vocab_size: tokens.
        window: the longest sequence.
        width: of the residual stream, a multiple of 4.
        layers: of GPT-2 and Llama, each with attention and an MLP. Mamba's layers have no MLP, so
            it gets five layers for every three of theirs.
        mixers: layers of ResNet-BK, whose MLPs may be small.
    """

    vocab_size: int
    window: int
    width: int
    layers: int
    mixers: int


@dataclass(frozen=True)
class Contestant:
    """A kind of model.

    Attributes:
        name: for file names, tables and JSON.
        build: builds a model with random weights from a frame and the open size.
        learning_rate: peak rate for language modelling.
        size_name: what the open size means.
    """

    name: str
    build: Callable[[Frame, int], PreTrainedModel]
    learning_rate: float
    size_name: str


def resnet_bk(
    frame: Frame, size: int, mixer: str = "resolvent", experts: int = 1, chosen: int = 1
) -> PreTrainedModel:
    """ResNet-BK, or an ablation of it, with experts of `size` hidden units.

    It has six heads in three pairs that share keys of size 32, and values one and a half times as
    wide as the residual stream. Where mixers are compared, each layer has one expert, so that all
    parameters are active. With more experts, an ablation, whose mixer is smaller, would get larger
    experts and have more idle parameters.
    """
    return LanguageModel(
        frame.vocab_size,
        frame.width,
        frame.mixers,
        frame.window,
        mixer=mixer,
        num_heads=6,
        key_size=32,
        key_groups=3,
        value_size=frame.width // 4,
        num_experts=experts,
        experts_per_token=chosen,
        expert_size=size,
    )


def gpt2(frame: Frame, size: int) -> PreTrainedModel:
    """GPT-2 with MLPs of `size` hidden units and heads of 32."""
    config = GPT2Config(
        vocab_size=frame.vocab_size,
        n_positions=frame.window,
        n_embd=frame.width,
        n_layer=frame.layers,
        n_head=frame.width // 32,
        n_inner=size,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,
    )
    return GPT2LMHeadModel(config)


def llama(frame: Frame, size: int) -> PreTrainedModel:
    """Llama with gated MLPs of `size` hidden units and heads of 32."""
    config = LlamaConfig(
        vocab_size=frame.vocab_size,
        max_position_embeddings=frame.window,
        hidden_size=frame.width,
        num_hidden_layers=frame.layers,
        num_attention_heads=frame.width // 32,
        intermediate_size=size,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def mamba(frame: Frame, size: int) -> PreTrainedModel:
    """Mamba with `size` inner channels."""
    config = MambaConfig(
        vocab_size=frame.vocab_size,
        hidden_size=frame.width,
        num_hidden_layers=round(frame.layers * 5 / 3),
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        use_cache=False,
    )
    config.intermediate_size = size
    return MambaForCausalLM(config)


_PERCEPTRON = "hidden units of a perceptron"
RESNET_BK = Contestant("resnet_bk", resnet_bk, 5e-3, _PERCEPTRON)
CONVOLUTION = Contestant("convolution", partial(resnet_bk, mixer="convolution"), 5e-3, _PERCEPTRON)
EXPERTS = Contestant(
    "experts", partial(resnet_bk, experts=8, chosen=2), 5e-3, "hidden units of an expert"
)
GREEN = Contestant("green", partial(resnet_bk, mixer="green"), 5e-3, _PERCEPTRON)
GPT2 = Contestant("gpt2", gpt2, 3e-3, _PERCEPTRON)
LLAMA = Contestant("llama", llama, 3e-3, _PERCEPTRON)
MAMBA = Contestant("mamba", mamba, 5e-3, "inner channels")


def open_size(contestant: Contestant, frame: Frame, parameters: int) -> int:
    """The open size whose number of active parameters is closest to `parameters`.

    Raises:
        InputError: if none is close enough; two models within the bound differ by less than 3 %.
    """

    def active(size: int) -> int:
        with torch.device("meta"):
            return active_parameters(contestant.build(frame, size))

    above = bisect_left(range(1, _LARGEST + 1), parameters, key=active) + 1
    size = min((max(1, above - 1), above), key=lambda near: abs(active(near) - parameters))
    found = active(size)
    if abs(found - parameters) > _BOUND * parameters:
        raise InputError(
            f"{contestant.name} cannot have {parameters:,} active parameters within "
            f"{100 * _BOUND:.1f} %; the closest is {found:,}, with {size} {contestant.size_name}; "
            f"change the frame {frame}"
        )
    return size


def active_parameters(model: nn.Module) -> int:
    """Parameters used for one token: all except those of experts that are not chosen.

    A tied embedding counts once, and a position table counts in full.
    """
    return total_parameters(model) - sum(
        (len(mixture.experts) - mixture.experts_per_token) * total_parameters(mixture.experts[0])
        for mixture in model.modules()
        if isinstance(mixture, MixtureOfExperts)
    )


def total_parameters(model: nn.Module) -> int:
    """All parameters; shared ones count once."""
    return sum(parameter.numel() for parameter in model.parameters())
