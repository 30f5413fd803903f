"""Sequence mixers: resolvent attention after short convolutions, and ablations without it."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bkcore.core import causal_sweep_parts
from bkcore.core.attention import AttentionInputs, attend
from bkcore.errors import ShapeError
from bkcore.kernels.recall import features, for_every_head, hopping_and_potential, over_memory
from bkcore.model.config import ResNetBKConfig
from bkcore.model.core_quantizers import CoreQuantizers
from bkcore.model.functions import ShortConvolution, exponential, silu, unit_length
from bkcore.model.state import LayerState
from bkcore.quantization.linear import QuantizedLinear
from bkcore.quantization.quantizers import GroupWiseQuantizer

_SHORTEST, _LONGEST = 8.0, 500.0
"""Initial memory lengths of the heads, log-spaced: sites until 1 - 1/e is forgotten."""

_BARRIER = math.exp(-6)
"""Initial height of the potential, in units of the hopping 1: far too low to localize."""

_ETA = 1e-4
"""Initial broadening: a lossless chain forgets after about sqrt(2 / eta) = 140 sites."""


class CoreInputs(NamedTuple):
    """The inputs of the core.

    query and key (B, N, G K), of unit length in each group of heads; value (B, N, W); gate and
    barrier (B, N, H).
    """

    query: Tensor
    key: Tensor
    value: Tensor
    gate: Tensor
    barrier: Tensor


class ResolventMixer(nn.Module):
    """Mix a sequence by resolvent attention: a memory of fixed size that can recall.

    Each of the H heads is a chain of its own; G groups of heads share queries and keys. Short
    causal convolutions turn the input into queries, keys and values, with queries and keys
    normalized to unit length. The input also gives every site and head a forget gate and a barrier.
    The output combines the value itself with Re and Im of what the query finds, all gated.
    `bkcore.kernels.recall` has the formulas.
    """

    def __init__(self, config: ResNetBKConfig) -> None:
        super().__init__()
        width = config.value_width
        self.heads = config.num_heads
        self.groups = config.key_groups or config.num_heads
        self.keys = self.groups * config.key_size
        self.width = width
        self.norm_eps = config.norm_eps
        mixed = width + 2 * self.keys
        self.sizes = (mixed, width, 2 * self.heads)
        self.in_proj: nn.Linear | QuantizedLinear = nn.Linear(
            config.d_model, sum(self.sizes), bias=False
        )
        self.conv = ShortConvolution(mixed, config.conv_width)
        self.log_rate = nn.Parameter(torch.empty(self.heads))
        self.log_barrier = nn.Parameter(torch.empty(self.heads))
        self.log_eta = nn.Parameter(torch.empty(self.heads))
        self.features = Features(width)
        self.out_proj: nn.Linear | QuantizedLinear = nn.Linear(width, config.d_model, bias=False)
        self.quantizers: CoreQuantizers | None = None

    @torch.no_grad()
    def reset(self) -> None:
        """Initialize as a layer that looks for what followed earlier copies of a token.

        Queries and keys start with equal projections; the queries' convolution takes the current
        site, the keys' the previous one. This is an induction head (Olsson et al., "In-context
        Learning and Induction Heads", 2022).
        """
        width, taps = self.width, self.conv.kernel_size[0]
        query, key = (slice(width + n * self.keys, width + (n + 1) * self.keys) for n in (0, 1))
        weight = self.in_proj.get_parameter("weight")
        weight[key] = weight[query]
        weight[-2 * self.heads :] *= 0.2
        self.conv.weight[width:] *= 0.2
        self.conv.weight[query, 0, -1] += 1
        self.conv.weight[key, 0, -min(2, taps)] += 1
        position = torch.linspace(0, 1, self.heads)
        self.log_rate.copy_(-math.log(_SHORTEST) - position * math.log(_LONGEST / _SHORTEST))
        self.log_barrier.fill_(math.log(_BARRIER))
        self.log_eta.fill_(math.log(_ETA))

    def first_state(self, batch: int) -> LayerState:
        """The memory of `batch` sequences before their first token."""
        shapes = self._state_shapes()
        like = self.log_eta.new_zeros
        core = torch.promote_types(self.log_eta.dtype, torch.float32)
        return LayerState(
            taps=like(batch, *shapes["taps"]),
            g=like(batch, *shapes["g"], dtype=core),
            psi=like(batch, *shapes["psi"], dtype=core),
        )

    def _state_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the fields of a `LayerState`, without the batch dimension."""
        return {
            "taps": (self.conv.kernel_size[0] - 1, self.sizes[0]),
            "g": (self.heads, 2),
            "psi": (self.heads, 2, self.keys // self.groups, self.width // self.heads),
        }

    def forward(self, x: Tensor, state: LayerState | None = None) -> tuple[Tensor, LayerState]:
        """Mix x (B, N, D), which continues after `state`.

        Returns:
            (B, N, D), whose position i depends only on `state` and on x up to i; and the state
            after the last position.

        Raises:
            ShapeError: if the state is from a layer of other sizes.
        """
        if state is None:
            state = self.first_state(len(x))
        else:
            self.check_state(state)
        inputs, opening, taps = self.core_inputs(x, state)
        inputs = self.quantized_inputs(inputs)
        parts, (g, psi) = self.recall(inputs, (state.g, state.psi))
        features = self.features(inputs.value, self.quantized_found(parts))
        return self.out_proj(gated(features, opening)), LayerState(taps, g, psi)

    def check_state(self, state: LayerState) -> None:
        """Raise `ShapeError` unless a state is one of this layer's."""
        for name, own in self._state_shapes().items():
            found = tuple(getattr(state, name).shape[1:])
            if found != own:
                raise ShapeError(
                    f"{name} of a layer's state is {found} per sequence, but this layer needs "
                    f"{own}; it is the state of another model"
                )

    def core_inputs(self, x: Tensor, state: LayerState) -> tuple[CoreInputs, Tensor, Tensor]:
        """The unquantized inputs of the core, the gate of the features, and the new taps."""
        mixed, opening, dynamics = self.in_proj(x).split(self.sizes, dim=-1)
        mixed = torch.cat((state.taps.to(mixed.dtype), mixed), 1)
        taps = mixed[:, mixed.shape[1] - state.taps.shape[1] :]
        mixed = self.conv(mixed)
        value, both = mixed.split((self.width, 2 * self.keys), dim=-1)
        both = unit_length(both.unflatten(-1, (2 * self.groups, -1)), self.norm_eps)
        query, key = both.flatten(2).chunk(2, dim=-1)
        gate, barrier = dynamics.chunk(2, dim=-1)
        return CoreInputs(query, key, value, gate, barrier), opening, taps

    def quantized_inputs(self, inputs: CoreInputs) -> CoreInputs:
        """The inputs after their quantizers, if there are any."""
        return CoreInputs(*(self._quantized(name, x) for name, x in inputs._asdict().items()))

    def quantized_found(self, parts: tuple[Tensor, Tensor]) -> Tensor:
        """Re and Im of what was found after their quantizers, (B, N, 2, W)."""
        names = ("found.real", "found.imag")
        return torch.stack([self._quantized(*x) for x in zip(names, parts, strict=True)], 2)

    def attention_inputs(self, inputs: CoreInputs, dtype: torch.dtype) -> AttentionInputs:
        """The inputs of resolvent attention; float64 hoppings and potentials rounded to `dtype`."""
        query, key = (
            for_every_head(x, self.heads, self.groups) for x in (inputs.query, inputs.key)
        )
        value = inputs.value.unflatten(-1, (self.heads, -1))
        rate, height = exponential(self.log_rate), exponential(self.log_barrier)
        dynamics = hopping_and_potential(inputs.gate, inputs.barrier, rate, height, dtype)
        return AttentionInputs(query, key, value, *dynamics)

    def recall(
        self, inputs: CoreInputs, state: tuple[Tensor, Tensor]
    ) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Re and Im of what was found, (B, N, W) each; and the state of the core."""
        eta = exponential(self.log_eta)
        attended = self.attention_inputs(inputs, inputs.value.dtype)
        out, g, state = attend(*attended, eta, state)
        real, imag = over_memory(out.real, out.imag, g.imag / eta, eta)
        return (real.flatten(2), imag.flatten(2)), state

    def _quantized(self, name: str, x: Tensor) -> Tensor:
        if self.quantizers is None:
            return x
        quantizer = self.quantizers.get_submodule(name)
        assert isinstance(quantizer, GroupWiseQuantizer)
        return self.quantizers.apply_to(quantizer, x)


class Features(nn.Module):
    """The mixer's output: a sum of the value, and of Re and Im of what was found in the past.

    Each channel has three learned weights.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(3, width))

    @torch.no_grad()
    def reset(self) -> None:
        """Start with equal weights for the value and Re, and less for Im, which is larger."""
        self.weight.copy_(torch.tensor([[1.0], [1.0], [0.1]]))

    def forward(self, value: Tensor, parts: Tensor) -> Tensor:
        """value (B, N, W), parts (B, N, 2, W) -> (B, N, W)."""
        real, imag = parts.unbind(2)
        return features(value, real, imag, self.weight)


class ConvolutionMixer(nn.Module):
    """A `ResolventMixer` without its core: the gated value alone. Ablates what the core gains."""

    def __init__(self, config: ResNetBKConfig) -> None:
        super().__init__()
        width = config.value_width
        self.in_proj = nn.Linear(config.d_model, 2 * width, bias=False)
        self.conv = ShortConvolution(width, config.conv_width)
        self.out_proj = nn.Linear(width, config.d_model, bias=False)

    def forward(self, x: Tensor, state: None = None) -> tuple[Tensor, None]:
        """x (B, N, D) -> (B, N, D), and no state: it is not there to stream."""
        value, opening = self.in_proj(x).chunk(2, dim=-1)
        value = self.conv(after_nothing(value, self.conv))
        return self.out_proj(gated(value, opening)), None


class GreenMixer(nn.Module):
    """A mixer whose only memory is g, without a propagated source: D chains, learned potentials.

    Ablates the propagated source: g depends on the whole past, but cannot carry content.
    """

    def __init__(self, config: ResNetBKConfig) -> None:
        super().__init__()
        width = config.value_width
        self.in_proj = nn.Linear(config.d_model, 3 * width, bias=False)
        self.conv = nn.Conv1d(2 * width, 2 * width, config.conv_width, groups=2 * width, bias=False)
        self.log_eta = nn.Parameter(torch.empty(width))
        self.energy = nn.Parameter(torch.empty(width))
        self.hopping = nn.Parameter(torch.empty(width))
        self.features = Features(width)
        self.out_proj = nn.Linear(width, config.d_model, bias=False)

    @torch.no_grad()
    def reset(self) -> None:
        """Spread the energies over the free chain's band, and eta over 0.005 to 0.5."""
        channels = torch.arange(self.energy.numel())
        # The golden ratio decorrelates a channel's energy from its eta.
        self.energy.copy_(2 * torch.cos(math.pi * ((channels * 0.6180339887) % 1)))
        self.log_eta.copy_(math.log(0.005) + (channels + 0.5) / len(channels) * math.log(100))
        self.hopping.fill_(1.0)

    def forward(self, x: Tensor, state: None = None) -> tuple[Tensor, None]:
        """x (B, N, D) -> (B, N, D), and no state: it is not there to stream."""
        width = len(self.energy)
        mixed, opening = self.in_proj(x).split((2 * width, width), dim=-1)
        mixed = self.conv(after_nothing(mixed, self.conv).transpose(1, 2)).transpose(1, 2)
        value, potential = mixed.chunk(2, dim=-1)
        g = causal_sweep_parts(
            0.3 * potential,  # strong enough to matter, weak enough not to localize
            energy=self.energy,
            eta=self.log_eta.exp(),
            hopping=self.hopping,
            onsite=0.0,
        )
        features = self.features(silu(value), g.to(value.dtype))
        return self.out_proj(gated(features, opening)), None


MIXERS: dict[str, type[nn.Module]] = {
    "resolvent": ResolventMixer,
    "convolution": ConvolutionMixer,
    "green": GreenMixer,
}
"""Mixer classes by the value of `ResNetBKConfig.mixer`."""


def gated(features: Tensor, opening: Tensor) -> Tensor:
    """Features (B, N, W) times their gate, in the dtype of `opening` (B, N, W)."""
    # The core and the quantizers work in at least float32, whatever the model is cast to.
    return features.to(opening.dtype) * silu(opening)


def after_nothing(x: Tensor, conv: nn.Conv1d) -> Tensor:
    """x (B, N, C) after as many zeros as a causal convolution sees before it."""
    return F.pad(x, (0, 0, conv.kernel_size[0] - 1, 0))
