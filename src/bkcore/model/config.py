"""Configuration of the ResNet-BK language model."""

from __future__ import annotations

import math
from typing import Any

from transformers import PreTrainedConfig

from bkcore.errors import InputError

_MIXERS = ("resolvent", "convolution", "green")


class ResNetBKConfig(PreTrainedConfig):
    """Sizes of a `ResNetBKForCausalLM` and, if it has one, the state of its quantization.

    Attributes:
        vocab_size: tokens; the embedding is tied to the output head.
        d_model: width D of the residual stream.
        n_layers: layers, each a mixer (the core) and a mixture of experts.
        n_seq: length of the training windows. The model takes any length.
        num_experts, experts_per_token: experts E of a layer and how many serve a token; 1 and 1
            is a plain perceptron without a router.
        expert_size: hidden units of one expert.
        mixer: "resolvent", or for comparison "convolution" (no core at all) or "green" (the Green's
            function g alone), which cannot be quantized.
        num_heads, key_size: heads H of the core, and the size K of their keys.
        key_groups: groups of heads that share queries and keys, which divide num_heads; None gives
            each head its own.
        value_size: the size of their values; None is D / H, which H then has to divide.
        embedding_multiplier: what embedded tokens are multiplied by on their way into the residual
            stream. They begin at a root mean square of `initializer_range`, which the default
            brings to a third of the size of what layers add.
        conv_width: taps of the causal depthwise convolution.
        dropout: probability with which training drops an embedded feature, and one of what a mixer
            or a mixture of experts adds.
        load_balancing: weight of the auxiliary loss that spreads tokens over experts.
        chunked_loss: train without the logits of all positions in memory; see `forward`.
        quantization: None, or the fields of a `QuantizationConfig` and its `state`.
    """

    model_type = "resnet_bk"
    attribute_map = {"hidden_size": "d_model", "num_hidden_layers": "n_layers"}  # noqa: RUF012

    vocab_size: int = 2048
    d_model: int = 128
    n_layers: int = 3
    n_seq: int = 256
    num_experts: int = 8
    experts_per_token: int = 2
    expert_size: int = 256
    mixer: str = "resolvent"
    num_heads: int = 4
    key_size: int = 32
    key_groups: int | None = None
    value_size: int | None = None
    embedding_multiplier: float = 16.0
    conv_width: int = 4
    dropout: float = 0.0
    load_balancing: float = 0.1
    chunked_loss: bool = False
    norm_eps: float = 1e-6
    initializer_range: float = 0.02
    quantization: dict[str, Any] | None = None
    use_cache: bool = True
    tie_word_embeddings: bool = False  # one module serves both, so there is nothing to tie

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        sizes = ("vocab_size", "d_model", "n_layers", "n_seq", "num_experts", "expert_size")
        for name in (*sizes, "experts_per_token", "num_heads", "key_size", "conv_width"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise InputError(f"{name} must be a positive integer, not {value!r}")
        if self.experts_per_token > self.num_experts:
            raise InputError(
                f"experts_per_token={self.experts_per_token} exceeds num_experts={self.num_experts}"
            )
        if not 0 < self.embedding_multiplier < math.inf:
            raise InputError(
                f"embedding_multiplier must be positive, not {self.embedding_multiplier!r}"
            )
        if not 0 <= self.dropout < 1:
            raise InputError(f"dropout must be at least 0 and below 1, not {self.dropout!r}")
        if self.mixer not in _MIXERS:
            raise InputError(f"mixer must be one of {', '.join(_MIXERS)}, not {self.mixer!r}")
        if self.value_size is None and self.mixer == "resolvent" and self.d_model % self.num_heads:
            raise InputError(
                f"num_heads={self.num_heads} must divide d_model={self.d_model}, unless value_size "
                "gives the size of a head's values"
            )
        for name in ("key_groups", "value_size"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise InputError(f"{name} must be None or a positive integer, not {value!r}")
        if self.key_groups is not None and self.num_heads % self.key_groups:
            raise InputError(
                f"key_groups={self.key_groups} must divide num_heads={self.num_heads}: groups are "
                "of one size"
            )

    @property
    def value_width(self) -> int:
        """Channels of the values of all heads together."""
        if self.value_size is None:
            return self.d_model
        return self.num_heads * self.value_size
