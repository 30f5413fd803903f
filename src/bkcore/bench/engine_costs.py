"""What a pass through a model must read and compute, counted, and how fast a plain read is.

Counted are the weights that the pass touches, once; the state or the cache of what was read before;
and the multiplications and additions of products, convolution, attention and state. Norms,
activation functions and the argmax are left out: they are below a percent.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import torch
from torch import nn
from transformers import LlamaConfig

from bkcore.bench.rival_models import count_parameters
from bkcore.bench.timing import Call
from bkcore.model import ResNetBKForCausalLM
from bkcore.model.layers import ResNetBKLayer
from bkcore.model.mixer import ResolventMixer
from bkcore.model.moe import MixtureOfExperts
from bkcore.quantization.linear import QuantizedLinear

_STATE_OPERATIONS = 14
"""For each complex number psi of the state, g (k u + t psi) and q psi: 2 for t psi, 2 to add k u, 6
for the product with g, and 4 to multiply by q and add."""

_CACHE_BYTES = 2
"""llama.cpp keeps keys and values in float16."""


@dataclass(frozen=True)
class Pass:
    """One call of a model.

    Attributes:
        context: tokens that each sequence has read before.
        sequences: how many there are.
        tokens: that the call reads of each.
    """

    context: int
    sequences: int = 1
    tokens: int = 1

    @property
    def total(self) -> int:
        """Tokens of all sequences."""
        return self.sequences * self.tokens


@dataclass(frozen=True)
class Cost:
    """Of a whole pass: bytes that must be read, and multiplications and additions."""

    bytes: int
    operations: int


def own_cost(model: ResNetBKForCausalLM, work: Pass) -> Cost:
    """What ResNet-BK needs: the same at every context.

    Of a layer's experts, the pass reads as many as its tokens can choose.
    """
    size = _bytes(model) + work.sequences * state_bytes(model)
    operations = 2 * model.config.vocab_size * model.config.d_model
    for mixer, mixture in _layers(model):
        chosen, experts = mixture.experts_per_token, len(mixture.experts)
        idle = experts - min(experts, chosen * work.total)
        size -= idle * _bytes(mixture.experts[0])
        operations += _mixing(mixer) + chosen * _products(mixture.experts[0])
        if mixture.router is not None:
            operations += _products(mixture.router)
    return Cost(size, work.total * operations)


def llama_cost(config: LlamaConfig, weight_bytes: int, work: Pass) -> Cost:
    """What a Llama needs, whose tensors take `weight_bytes`: its cache grows with the context."""
    layers, width = config.num_hidden_layers, config.hidden_size
    head = width // config.num_attention_heads
    keys = head * (config.num_key_value_heads or config.num_attention_heads)
    cached = 2 * _CACHE_BYTES * keys * layers
    weights = layers * width * (2 * width + 2 * keys + 3 * config.intermediate_size)
    weights += config.vocab_size * width
    seen = work.context + (work.tokens + 1) / 2  # by the average token
    operations = round(work.total * (2 * weights + 4 * layers * width * seen))
    read = work.sequences * (work.context + work.tokens)
    return Cost(weight_bytes + cached * read, operations)


def active_parameters(model: ResNetBKForCausalLM) -> int:
    """Parameters of a float model that serve one token: not those of experts not chosen."""
    return count_parameters(model) - sum(
        (len(mixture.experts) - mixture.experts_per_token) * count_parameters(mixture.experts[0])
        for _, mixture in _layers(model)
    )


def state_bytes(model: ResNetBKForCausalLM) -> int:
    """Bytes of the state of one sequence."""
    state = model.first_state()
    return sum(x.nbytes for layer in state.layers for x in vars(layer).values())


def plain_read(size: int) -> Call:
    """A call that reads `size` bytes, 4 at least, on PyTorch's threads, and adds them up."""
    return torch.ones(max(1, size // 4)).sum


def _layers(model: ResNetBKForCausalLM) -> Iterator[tuple[ResolventMixer, MixtureOfExperts]]:
    for layer in model.layers:
        assert isinstance(layer, ResNetBKLayer)
        assert isinstance(layer.mixer, ResolventMixer)
        yield layer.mixer, layer.experts


def _bytes(module: nn.Module) -> int:
    return sum(x.nbytes for x in (*module.parameters(), *module.buffers()))


def _products(module: nn.Module) -> int:
    """Operations of all linear layers of a module, for one token."""
    layers = (m for m in module.modules() if isinstance(m, nn.Linear | QuantizedLinear))
    return sum(2 * prod(layer.weight.shape) for layer in layers)


def _mixing(mixer: ResolventMixer) -> int:
    taps, psi = mixer.conv.weight.numel(), mixer.first_state(1).psi.numel() // 2
    return _products(mixer) + 2 * taps + _STATE_OPERATIONS * psi
