"""Configuration of the ResNet-BK language model."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from transformers import GenerationConfig, PreTrainedConfig

from bkcore.arguments import did_you_mean
from bkcore.errors import InputError
from bkcore.quantization.config import QuantizationConfig
from bkcore.quantization.lifecycle import QuantizationState
from bkcore.reading import parse_json, shown

_LARGEST = 2**31 - 1

_SIZES = (
    *("vocab_size", "d_model", "n_layers", "n_seq", "num_experts", "expert_size"),
    *("experts_per_token", "num_heads", "key_size", "conv_width"),
)
_NUMBERS = ("embedding_multiplier", "dropout", "load_balancing", "norm_eps", "initializer_range")
_FLAGS = ("chunked_loss", "use_cache", "tie_word_embeddings")

_DTYPES = ("float16", "bfloat16", "float32", "float64")

_ELSEWHERE = {
    *("model_type", "torch_dtype", "auto_map", "name_or_path", "_name_or_path", "_commit_hash"),
    *("num_labels", "output_attentions", "attn_implementation", "experts_implementation"),
    *("hidden_size", "num_hidden_layers"),
}
"""Names that transformers uses: a configuration may hold them, but they are not fields here."""

_REFUSED = {
    *("quantization_config", "compression_config", "transformers_weights", "distributed_config"),
    *("text_config", "text_encoder", "decoder", "generator", "encoder", "fusion_config"),
    *("gradient_checkpointing", "rope_parameters", "rope_theta", "layer_types"),
    *("mlp_layer_types", "mtp_layer_types", "mtp_mlp_layer_types", "mtp_per_layer_config"),
    *("num_mtp_layers", "first_k_dense_replace", "gguf_file"),
}
"""Names that make transformers treat this as another kind of model, or look for files."""

_NOTE_BYTES = 1 << 20


class MixerTraits(NamedTuple):
    """What a model can do because of its mixer.

    Attributes:
        has_heads: the mixer divides its channels among heads.
        streams: it keeps a state of fixed size, from which the model can continue.
        quantizes: modes can quantize it, and certificates bound the error.
    """

    has_heads: bool
    streams: bool
    quantizes: bool


MIXER_TRAITS = {
    "resolvent": MixerTraits(has_heads=True, streams=True, quantizes=True),
    "convolution": MixerTraits(has_heads=False, streams=False, quantizes=False),
    "green": MixerTraits(has_heads=False, streams=False, quantizes=False),
}
"""Traits by the value of `ResNetBKConfig.mixer`; `bkcore.model.mixer.MIXERS` has the classes."""


class ResNetBKConfig(PreTrainedConfig):
    """Sizes of a `ResNetBKForCausalLM` and, if it has one, the state of its quantization.

    Attributes:
        vocab_size: number of tokens; the output head shares the embedding's weights.
        d_model: width D of the residual stream.
        n_layers: layers, each a mixer (the core) and a mixture of experts.
        n_seq: length of the training windows. The model takes any length.
        num_experts, experts_per_token: experts E of a layer, and how many serve each token. With 1
            and 1 the layer is a plain perceptron without a router.
        expert_size: hidden units of one expert.
        mixer: "resolvent"; or, for comparison only, "convolution" (no core at all) or "green" (the
            Green's function g alone). Those two cannot be quantized.
        num_heads, key_size: heads H of the core, and the size K of their keys.
        key_groups: number of groups of heads that share queries and keys; must divide num_heads.
            None gives each head its own.
        value_size: size of a head's values. None means D / H, and then H must divide D.
        embedding_multiplier: factor on the embedded tokens before they enter the residual stream.
            Embeddings start with a root mean square of `initializer_range`; the default factor
            brings them to a third of the size of what the layers add.
        conv_width: taps of the causal depthwise convolution.
        dropout: dropout probability in training, for the embedded tokens and for the outputs of
            mixers and mixtures of experts.
        load_balancing: weight of the auxiliary loss that spreads tokens over experts.
        chunked_loss: train without holding the logits of all positions in memory; see `forward`.
        quantization: None, or the fields of a `QuantizationConfig` plus its `state`.
        training_text: what the model was trained on: the `name` of a corpus, and the SHA-256 of
            its `train` and `valid` parts in UTF-8. None if unknown.

    Other names with plain JSON values are kept; the model ignores them.
    """

    model_type = "resnet_bk"
    keys_to_ignore_at_inference = ["cache_params"]  # noqa: RUF012
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
    training_text: dict[str, str] | None = None
    use_cache: bool = True
    tie_word_embeddings: bool = False  # one module serves both, so there is nothing to tie

    def __post_init__(self, **kwargs: Any) -> None:
        _check_inherited(self, kwargs)
        super().__post_init__(**kwargs)
        _check_kinds(self)
        _check_values(self)
        _check_mixer(self)
        if self.quantization is not None:
            if not self.mixer_traits.quantizes:
                raise InputError(f'a model with mixer="{self.mixer}" cannot be quantized')
            form_of(self.quantization)
        _check_training_text(self.training_text)

    @property
    def mixer_traits(self) -> MixerTraits:
        """What the model can do because of its mixer."""
        return MIXER_TRAITS[self.mixer]

    @property
    def value_width(self) -> int:
        """Channels of the values of all heads together."""
        if self.value_size is None:
            return self.d_model
        return self.num_heads * self.value_size


def form_of(fields: object) -> tuple[QuantizationConfig, QuantizationState]:
    """Read `ResNetBKConfig.quantization`: how a model is quantized, and which state it is in.

    Raises:
        InputError: if `fields` is not valid.
    """
    if not isinstance(fields, dict):
        raise InputError(f"quantization must be None or a dictionary, not {shown(fields)}")
    options = dict(fields)
    state = options.pop("state", QuantizationState.FLOAT.value)
    states = [each.value for each in QuantizationState if each != QuantizationState.CALIBRATING]
    if state not in states:
        raise InputError(
            f"the state of quantization must be one of {states}, not {shown(state)}"
            f"{did_you_mean(state, states)}"
        )
    config = QuantizationConfig.from_dict(options)
    if state == QuantizationState.TRAINING.value and not config.is_qat:
        raise InputError(f"mode {config.mode!r} does not train, but the state is {state!r}")
    return config, QuantizationState(state)


def _check_kinds(config: ResNetBKConfig) -> None:
    for name in (*_SIZES, "key_groups", "value_size"):
        value = getattr(config, name)
        if value is None and name not in _SIZES:
            continue
        if type(value) is not int or value < 1:
            allowed = "a positive integer" if name in _SIZES else "None or a positive integer"
            raise InputError(f"{name} must be {allowed}, not {shown(value)}")
        if value > _LARGEST:
            raise InputError(f"{name} must be at most {_LARGEST:,}, not {shown(value)}")
    for name in _NUMBERS:
        if not _is_number(getattr(config, name)):
            wanted = "positive and finite" if name == "embedding_multiplier" else "a finite number"
            raise InputError(f"{name} must be {wanted}, not {shown(getattr(config, name))}")
        setattr(config, name, float(getattr(config, name)))  # tensors take no huge integers
    for name in _FLAGS:
        if not isinstance(getattr(config, name), bool):
            raise InputError(f"{name} must be True or False, not {shown(getattr(config, name))}")


def _check_values(config: ResNetBKConfig) -> None:
    if config.experts_per_token > config.num_experts:
        raise InputError(
            f"experts_per_token={config.experts_per_token} exceeds num_experts={config.num_experts}"
        )
    if not config.embedding_multiplier > 0:
        raise InputError(
            f"embedding_multiplier must be positive, not {config.embedding_multiplier!r}"
        )
    if not 0 <= config.dropout < 1:
        raise InputError(f"dropout must be at least 0 and below 1, not {config.dropout!r}")
    for name in ("load_balancing", "norm_eps", "initializer_range"):
        if getattr(config, name) < 0:
            raise InputError(f"{name} must not be negative, not {getattr(config, name)!r}")


def _check_mixer(config: ResNetBKConfig) -> None:
    if not isinstance(config.mixer, str) or config.mixer not in MIXER_TRAITS:
        known = ", ".join(MIXER_TRAITS)
        raise InputError(
            f"mixer must be one of {known}, not {shown(config.mixer)}"
            f"{did_you_mean(config.mixer, MIXER_TRAITS)}"
        )
    divided = config.mixer_traits.has_heads and config.value_size is None
    if divided and config.d_model % config.num_heads:
        raise InputError(
            f"num_heads={config.num_heads} must divide d_model={config.d_model}, unless value_size "
            "gives the size of a head's values"
        )
    if config.key_groups is not None and config.num_heads % config.key_groups:
        raise InputError(
            f"key_groups={config.key_groups} must divide num_heads={config.num_heads}: all groups "
            "have the same size"
        )


def _check_inherited(config: ResNetBKConfig, others: Mapping[str, Any]) -> None:
    """Check what transformers is about to take for granted."""
    for name in (
        others.keys() - _ELSEWHERE - GenerationConfig._get_default_generation_params().keys()
    ):
        if not name or name in _REFUSED or name.startswith("_") or hasattr(ResNetBKConfig, name):
            raise InputError(
                f"a ResNetBKConfig cannot have {shown(name)}, which transformers gives a meaning "
                "of its own; if it is not from another model's configuration, rename it"
            )
        if not _is_plain({name: others[name]}):
            raise InputError(
                f"{shown(name)} of a ResNetBKConfig cannot be {shown(others[name])}; extra fields "
                "must be plain JSON, finite and at most one mebibyte"
            )
    values = {**vars(config), **others}
    for name, kind in _KINDS.items():
        value = values.get(name)
        if value is not None and not kind(value):
            raise InputError(f"{name} of a ResNetBKConfig cannot be {shown(value)}")


def _check_training_text(value: object) -> None:
    if value is None:
        return
    if not isinstance(value, dict) or value.keys() != {"name", "train", "valid"}:
        raise InputError(
            "training_text must be None or a dictionary with the keys name, train and valid, not "
            f"{shown(value)}"
        )
    if not all(map(_is_text, value.values())):
        raise InputError(f"the values of training_text must be strings, not {shown(value)}")


def _is_number(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) <= sys.float_info.max


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_plain(value: object) -> bool:
    """Whether a value can be written as JSON, and is small enough to be read back."""
    try:
        content = json.dumps(value, allow_nan=False, ensure_ascii=False).encode()
        parse_json(content)
    except (TypeError, ValueError, RecursionError):
        return False
    return len(content) <= _NOTE_BYTES


def _is_path(value: object) -> bool:
    return isinstance(value, str | os.PathLike)


def _is_dtype(value: object) -> bool:
    name = str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value
    return name in _DTYPES


def _are_tokens(value: object) -> bool:
    several = value if isinstance(value, list) else [value]
    return all(type(token) is int and abs(token) <= _LARGEST for token in several)


def _are_labels(value: object) -> bool:
    """Whether this is a dictionary from numbers to names."""
    if not isinstance(value, dict):
        return False
    return all(str(k).isdecimal() and len(str(k)) < 10 and _is_text(v) for k, v in value.items())


def _are_numbers(value: object) -> bool:
    """Whether this is a dictionary of integers."""
    return isinstance(value, dict) and all(type(each) is int for each in value.values())


_KINDS: dict[str, Callable[[Any], bool]] = {
    "model_type": lambda value: value == ResNetBKConfig.model_type,
    "transformers_version": _is_text,
    "architectures": lambda value: isinstance(value, list) and all(map(_is_text, value)),
    "output_hidden_states": lambda value: isinstance(value, bool),
    "output_attentions": lambda value: isinstance(value, bool),
    "return_dict": lambda value: isinstance(value, bool),
    "dtype": _is_dtype,
    "torch_dtype": _is_dtype,
    "chunk_size_feed_forward": lambda value: value == 0,
    "is_encoder_decoder": lambda value: value is False,
    "id2label": _are_labels,
    "label2id": _are_numbers,
    "problem_type": lambda value: False,
    "num_labels": lambda value: type(value) is int and 0 <= value <= _LARGEST >> 16,
    "auto_map": lambda value: isinstance(value, dict) and all(map(_is_text, value.values())),
    # The model has no other implementation, and transformers may take a name for code on a hub.
    "attn_implementation": lambda value: value == "eager",
    "experts_implementation": lambda value: value == "eager",
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id"), _are_tokens),
    "max_position_embeddings": lambda value: type(value) is int and 0 < value <= _LARGEST,
    **dict.fromkeys(("name_or_path", "_name_or_path", "_commit_hash"), _is_path),
}
"""For each field: whether transformers can take a value that is not None."""
