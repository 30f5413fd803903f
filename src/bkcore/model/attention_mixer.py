"""A sequence mixer with a matrix-valued memory: resolvent attention behind short convolutions."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bkcore.core import resolvent_attention
from bkcore.model.config import ResNetBKConfig

_LONGEST, _SHORTEST = 500.0, 8.0
"""Sites after which the hopping of a head has forgotten 1 - 1/e at the start, over the heads."""

_ETA = 1e-3
"""Broadening at the start: small, so that the hopping alone decides what is forgotten."""


class AttentionMixer(nn.Module):
    """Mix a sequence by resolvent attention, or by its convolutions alone.

    The input gives queries, keys and values through short causal convolutions, and the hopping of
    each head, a forget gate in (0, 1). What is read out is the value itself and the real part of
    what `resolvent_attention` finds, normalized per head and gated. The potential is 0: the
    resolvent is a product of hoppings, damped by a learned eta.

    `config.mixer == "convolution"` leaves the attention out: the ablation of what it gains.
    """

    def __init__(self, config: ResNetBKConfig) -> None:
        super().__init__()
        width = config.d_model
        self.heads = config.num_heads if config.mixer == "attention" else 0
        self.keys = self.heads * config.key_size
        mixed = width + 2 * self.keys
        self.in_proj = nn.Linear(width, mixed + width, bias=False)
        self.conv = nn.Conv1d(mixed, mixed, config.conv_width, groups=mixed, bias=False)
        if self.heads:
            self.forget = nn.Linear(width, self.heads, bias=False)
            self.log_rate = nn.Parameter(torch.empty(self.heads))
            self.log_eta = nn.Parameter(torch.empty(self.heads))
            self.head_norm = nn.RMSNorm(width // self.heads, eps=config.norm_eps)
        self.out_proj = nn.Linear(width * (2 if self.heads else 1), width, bias=False)

    @torch.no_grad()
    def reset(self) -> None:
        """Start as a layer that recalls: it looks for what followed earlier copies of a token.

        Queries and keys start equal, the queries' taps at the present site and the keys' at the
        one before (an induction head: Olsson et al., "In-context Learning and Induction Heads",
        2022).
        """
        if not self.heads:
            return
        width = self.out_proj.out_features
        query, key = (slice(width + n * self.keys, width + (n + 1) * self.keys) for n in (0, 1))
        self.in_proj.weight[key] = self.in_proj.weight[query]
        self.conv.weight[width:] *= 0.2
        self.conv.weight[query, 0, -1] += 1
        self.conv.weight[key, 0, -2 if self.conv.kernel_size[0] > 1 else -1] += 1
        position = torch.linspace(0, 1, self.heads)
        self.log_rate.copy_(-math.log(_SHORTEST) - position * math.log(_LONGEST / _SHORTEST))
        self.log_eta.fill_(math.log(_ETA))
        self.forget.weight.mul_(0.2)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, N, D) -> (B, N, D); position i of the result depends on x up to i only."""
        width = x.shape[-1]
        mixed, gate = self.in_proj(x).split((width + 2 * self.keys, width), dim=-1)
        value, query, key = F.silu(self._convolve(mixed)).split(
            (width, self.keys, self.keys), dim=-1
        )
        gate = F.silu(gate)
        if not self.heads:
            return self.out_proj(value * gate)
        found = self._recall(x, query, key, value).to(gate.dtype)
        return self.out_proj(torch.cat((value * gate, found * gate), -1))

    def _convolve(self, x: Tensor) -> Tensor:
        """Causal depthwise convolution over time of x (B, N, C)."""
        padded = F.pad(x.transpose(1, 2), (self.conv.kernel_size[0] - 1, 0))
        return self.conv(padded).transpose(1, 2)

    def _recall(self, x: Tensor, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """What the queries find, (B, N, D)."""
        query, key, value = (part.unflatten(-1, (self.heads, -1)) for part in (query, key, value))
        rate = 2 * self.log_rate.exp() * torch.sigmoid(self.forget(x))
        hopping = torch.exp(-rate)
        potential = torch.zeros_like(hopping)
        out, _, _ = resolvent_attention(query, key, value, hopping, potential, self.log_eta.exp())
        return self.head_norm(out.real.to(self.head_norm.weight.dtype)).flatten(2)
