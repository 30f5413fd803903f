"""The sequence mixer: a causal sweep of the resolvent between two projections."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bkcore.core.resolvent import causal_sweep_parts
from bkcore.model.config import ResNetBKConfig
from bkcore.quantization.config import QuantizationConfig
from bkcore.quantization.linear import QuantizedLinear
from bkcore.quantization.quantizers import ComplexQuantizer, GroupWiseQuantizer

Phase = Literal["idle", "observe", "quantize"]

_POTENTIAL_SCALE = 0.3
"""Initial strength of the disorder: strong enough to matter, weak enough not to localize psi."""


class CoreQuantizers(nn.Module):
    """Quantizers of what enters and leaves the sweep, a scale per channel (never per position).

    `phase` says what a call does: nothing, observe its tensor, or fake-quantize it.
    """

    def __init__(self, channels: int, config: QuantizationConfig, *, learnable: bool) -> None:
        super().__init__()
        self.phase: Phase = "idle"
        group_size = 1 if config.per_channel else channels
        common: dict[str, Any] = {
            "bits": config.bits,
            "learnable": learnable,
            "norm": 2,
            "group_size": group_size,
        }
        symmetric = config.symmetric is not False
        self.potential = GroupWiseQuantizer(channels, symmetric=symmetric, **common)
        # The source comes out of SiLU, which is never below -0.28.
        self.source = GroupWiseQuantizer(channels, symmetric=config.symmetric is True, **common)
        self.g = ComplexQuantizer(channels, symmetric=config.symmetric, **common)
        # Unlike Im g, neither part of psi has a sign.
        self.psi = ComplexQuantizer(channels, symmetric=symmetric, **common)

    def parts(self) -> list[GroupWiseQuantizer]:
        """The six real quantizers: potential, source, Re g, Im g, Re psi, Im psi."""
        complex_parts = [self.g.real, self.g.imag, self.psi.real, self.psi.imag]
        return [self.potential, self.source, *complex_parts]

    def apply_to(self, quantizer: GroupWiseQuantizer, x: Tensor) -> Tensor:
        """Pass x (..., H) through one quantizer as the phase asks."""
        if self.phase == "observe":
            quantizer.observe(x)
        return quantizer.fake_quantize(x) if self.phase == "quantize" else x


class ResolventMixer(nn.Module):
    """Mix a sequence by the left-connected resolvent of a learned, input-dependent Hamiltonian.

    Each of H channels has its own energy, broadening eta and hopping. The input gives a potential v
    and a source b through a short causal convolution; one causal sweep gives the Green's function g
    and the propagated source psi; what is read out is g, psi and b, gated.

    psi is divided by sqrt(Im g / eta): for white sources the result has unit variance whatever eta
    (Ward identity), which puts channels whose memory spans decades on one scale.
    """

    def __init__(self, config: ResNetBKConfig) -> None:
        super().__init__()
        channels = config.d_model
        self.eta_min = config.eta_min
        self.in_proj: nn.Linear | QuantizedLinear = nn.Linear(
            config.d_model, 3 * channels, bias=False
        )
        self.conv = nn.Conv1d(
            2 * channels, 2 * channels, config.conv_width, groups=2 * channels, bias=False
        )
        self.energy = nn.Parameter(torch.empty(channels))
        self.log_eta = nn.Parameter(torch.empty(channels))
        self.hopping = nn.Parameter(torch.empty(channels))
        self.out_proj: nn.Linear | QuantizedLinear = nn.Linear(
            5 * channels, config.d_model, bias=False
        )
        self.quantizers: CoreQuantizers | None = None

    def reset_channels(self) -> None:
        """Spread energies over the band of the free chain and eta over 0.005 to 0.5."""
        channels = self.energy.shape[0]
        position = (torch.arange(channels) + 0.5) / channels
        with torch.no_grad():
            # The golden ratio decorrelates a channel's energy from its eta.
            angle = math.pi * ((torch.arange(channels) * 0.6180339887) % 1)
            self.energy.copy_(2 * torch.cos(angle))
            self.log_eta.copy_(math.log(0.005) + position * math.log(100))
            self.hopping.fill_(1.0)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, N, D) -> (B, N, D); position i of the result depends on x up to i only."""
        mixed, gate = self.in_proj(x).split((2 * self.energy.numel(), self.energy.numel()), dim=-1)
        potential, source = self._convolve(mixed).chunk(2, dim=-1)
        potential = self._quantized("potential", _POTENTIAL_SCALE * potential)
        source = self._quantized("source", F.silu(source))
        features = torch.cat((self._features(potential, source), source[:, :, None]), dim=2)
        # The sweep and the quantizers work in float32 at least, whatever the model is cast to.
        features = features.to(gate.dtype) * F.silu(gate)[:, :, None]
        return self.out_proj(features.flatten(2))

    def _convolve(self, x: Tensor) -> Tensor:
        """Causal depthwise convolution over time of x (B, N, C)."""
        padded = F.pad(x.transpose(1, 2), (self.conv.kernel_size[0] - 1, 0))
        return self.conv(padded).transpose(1, 2)

    def _features(self, potential: Tensor, source: Tensor) -> Tensor:
        """Re g, Im g, Re psi, Im psi, normalized and quantized: (B, N, 4, H)."""
        eta = self.eta_min + self.log_eta.exp()
        parts = causal_sweep_parts(
            potential, source, energy=self.energy, eta=eta, hopping=self.hopping, onsite=0.0
        )
        g_real, g_imag, psi_real, psi_imag = parts.unbind(2)
        ward = torch.sqrt(eta / g_imag)
        features: tuple[Tensor, ...] = (g_real, g_imag, psi_real * ward, psi_imag * ward)
        if self.quantizers is not None:
            quantizers = self.quantizers.parts()[2:]
            features = tuple(
                self.quantizers.apply_to(quantizer, feature)
                for quantizer, feature in zip(quantizers, features, strict=True)
            )
        return torch.stack(features, dim=2)

    def _quantized(self, name: Literal["potential", "source"], x: Tensor) -> Tensor:
        if self.quantizers is None:
            return x
        return self.quantizers.apply_to(getattr(self.quantizers, name), x)
