"""The parts of a language model: the token embedding, the layers, and their initial values."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer

from bkcore.model.config import ResNetBKConfig
from bkcore.model.functions import RMSNorm
from bkcore.model.mixer import MIXERS, ConvolutionMixer, Features, GreenMixer, ResolventMixer
from bkcore.model.moe import MixtureOfExperts
from bkcore.model.state import LayerState


class TokenEmbedding(nn.Embedding):
    """Token embedding (V, D), which is also the output head."""

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores (..., V) of hidden states (..., D)."""
        return F.linear(hidden, self.weight)


class ResNetBKLayer(GradientCheckpointingLayer):
    """Mixer, then experts; each has a norm before it and a residual connection around it.

    With activation checkpointing, training keeps only the layer's input and recomputes the rest in
    the backward pass.
    """

    def __init__(self, config: ResNetBKConfig) -> None:
        super().__init__()
        self.mixer_norm = RMSNorm(config.d_model, eps=config.norm_eps)
        self.mixer = MIXERS[config.mixer](config)
        self.experts_norm = RMSNorm(config.d_model, eps=config.norm_eps)
        self.experts = MixtureOfExperts(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, hidden: Tensor, state: LayerState | None = None, real: Tensor | None = None
    ) -> tuple[Tensor, Tensor, LayerState | None]:
        """Pass hidden states through the mixer and the experts.

        Args:
            hidden: (B, N, D).
            state: the layer's memory of what came before; None starts afresh.
            real: bool (B, N), False for padding; None if nothing is padded.

        Returns:
            (B, N, D), the load-balancing loss of this layer, and its state after `hidden`, None for
            a mixer that keeps none.
        """
        mixed, state = self.mixer(self.mixer_norm(hidden), state)
        hidden = hidden + self.dropout(mixed)
        update, balance = self.experts(self.experts_norm(hidden), real)
        return hidden + self.dropout(update), balance, state


@torch.no_grad()
def initialize(module: nn.Module, config: ResNetBKConfig) -> None:
    """Initialize the parameters of one module, without its submodules.

    A layer starts as the identity: the output projections of its mixer and experts are zero.
    """
    if isinstance(module, nn.Linear):
        init.normal_(module.weight, std=module.in_features**-0.5)
    elif isinstance(module, nn.Embedding):
        init.normal_(module.weight, std=config.initializer_range)
    elif isinstance(module, nn.RMSNorm):
        init.ones_(module.weight)
    elif isinstance(module, ResolventMixer | ConvolutionMixer | GreenMixer):
        init.normal_(module.conv.weight, std=config.conv_width**-0.5)
        init.zeros_(module.out_proj.get_parameter("weight"))
        if isinstance(module, ResolventMixer | GreenMixer):
            module.reset()
    elif isinstance(module, Features):
        module.reset()
