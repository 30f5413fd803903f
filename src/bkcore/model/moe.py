"""Mixture of experts: its top-k experts serve every token, and no token is dropped.

Routing and the load-balancing loss follow Fedus et al., "Switch Transformers", JMLR 2022, eqs. 4-6,
with the top-k weights normalized to sum to one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from bkcore.model.config import ResNetBKConfig
from bkcore.model.functions import Router, in_turn, silu, softmax
from bkcore.quantization.linear import QuantizedLinear

_BLOCK = 32

_TRAINED_ROWS = 64
"""In training, experts round their number of rows up to a multiple of this, so that oneDNN reuses
its kernels: making one for the exact number of each step would cost as much as the product."""


class Expert(nn.Module):
    """A two-layer perceptron D -> F -> D with SiLU."""

    def __init__(self, config: ResNetBKConfig) -> None:
        super().__init__()
        self.up: nn.Linear | QuantizedLinear = nn.Linear(
            config.d_model, config.expert_size, bias=False
        )
        self.down: nn.Linear | QuantizedLinear = nn.Linear(
            config.expert_size, config.d_model, bias=False
        )

    def forward(self, x: Tensor) -> Tensor:
        """x (M, D) -> (M, D)."""
        if self.training:
            return _padded(self.perceptron, x, x.shape[0] + -x.shape[0] % _TRAINED_ROWS)
        if _is_exact(self.up) and _is_exact(self.down):
            return self.down(silu(self.up(x)))
        return _in_blocks(self.perceptron, x)

    def perceptron(self, x: Tensor) -> Tensor:
        """x (..., D) -> (..., D), in one product whatever the number of rows."""
        return self.down(silu(self.up(x)))


def _is_exact(layer: nn.Module) -> bool:
    return isinstance(layer, QuantizedLinear) and layer.is_exact


def _in_blocks(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Apply a function to rows (M, D), with the same bits in each row whatever M is.

    A float product may round a row differently when the number of rows changes. But the number of
    tokens an expert serves depends on later tokens, and a stream has one token where a whole text
    has many. Blocks of a fixed size keep the model causal, and streams equal to whole texts, bit
    for bit. (Products of codes are exact and do not need this.)
    """
    if x.shape[0] <= _BLOCK:
        return _padded(function, x, _BLOCK)
    return torch.cat([_padded(function, block, _BLOCK) for block in x.split(_BLOCK)])


def _padded(function: Callable[[Tensor], Tensor], x: Tensor, rows: int) -> Tensor:
    """Apply a function to rows (M, D), padded to `rows` rows for the call."""
    count = x.shape[0]  # len() takes longer than a small sum
    if count == rows:
        return function(x)
    return function(F.pad(x, (0, 0, 0, rows - count)))[:count]


class MixtureOfExperts(nn.Module):
    """Route each token to `experts_per_token` of `num_experts` experts.

    A single expert has nothing to route: it is a plain perceptron, without a router.

    Attributes:
        load: None, or int64 (E,): the tokens of each expert, counted inside `counting_load`.
        calibration_load: None, or int64 (E,): the same, counted during calibration.
    """

    def __init__(self, config: ResNetBKConfig) -> None:
        super().__init__()
        self.experts_per_token = config.experts_per_token
        self.router: Router | None = None
        if config.num_experts > 1:
            self.router = Router(config.d_model, config.num_experts)
        self.experts = nn.ModuleList(Expert(config) for _ in range(config.num_experts))
        self.load: Tensor | None = None
        self.calibration_load: Tensor | None = None

    def forward(self, x: Tensor, real: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x (B, N, D) -> (B, N, D), and the load-balancing loss.

        This loss is 1 when the load is even and `num_experts` when one expert serves all tokens.
        Outside training, or without a router, it is 0.

        In data-parallel training each process combines the load of all processes with the mean
        probabilities of its own tokens. If all processes have equally many real tokens, the mean of
        their losses is the loss of the whole batch in one process; otherwise it is close to it.

        Args:
            x: (B, N, D).
            real: bool (B, N), False for padding, which is served but counts neither in the load nor
                in the loss; None if nothing is padded.
        """
        if self.router is None:
            return cast(Expert, self.experts[0]).perceptron(x), x.new_zeros(())
        tokens = x.reshape(-1, x.shape[-1])
        scores = self.router(tokens) if self.training else _in_blocks(self.router, tokens)
        probabilities = softmax(scores)
        # Of equals the first, which `topk` does not promise.
        weights, chosen = (
            found[..., : self.experts_per_token]
            for found in probabilities.sort(dim=-1, descending=True, stable=True)
        )
        weights = weights / in_turn(weights)
        served = self._serve(tokens, chosen)
        served = served * weights[..., None].to(served.dtype)
        out = in_turn(served.transpose(1, 2)).view_as(x)
        if self.load is not None:
            self.load += self._load_of(chosen, real)
        if self.calibration_load is not None:  # replaced, so that a failed pass can be undone
            self.calibration_load = self.calibration_load + self._load_of(chosen, real)
        if not self.training:
            return out, x.new_zeros(())
        load = of_all_processes(self._load_of(chosen, real))
        share = load / load.sum()
        if real is None:
            mean = probabilities.mean(0)
        else:
            mean = (probabilities * real.reshape(-1, 1)).sum(0) / real.sum()
        balance = len(self.experts) * (share * mean).sum()
        return out, balance

    def _load_of(self, chosen: Tensor, real: Tensor | None = None) -> Tensor:
        """Tokens per expert, int64 (E,), from the chosen experts (T, k)."""
        experts = torch.arange(len(self.experts), device=chosen.device)
        served = chosen[..., None] == experts
        if real is not None:
            served = served & real.reshape(-1, 1, 1)
        return served.sum((0, 1))

    def new_count(self) -> Tensor:
        """Zeros, int64 (E,), to count in."""
        device = next(self.parameters()).device
        return torch.zeros(len(self.experts), dtype=torch.int64, device=device)

    def _serve(self, tokens: Tensor, chosen: Tensor) -> Tensor:
        """Outputs of the chosen experts: tokens (T, D), chosen (T, k) -> (T, k, D).

        In training, an idle expert still runs, on zero rows. This gives every parameter a gradient,
        if only zeros: processes that share gradients wait for each one.
        """
        if torch.compiler.is_compiling():
            return self._serve_densely(tokens, chosen)
        if tokens.shape[0] == 1 and not self.training:  # nothing to sort
            return torch.stack([self.experts[i](tokens) for i in chosen[0].tolist()], 1)
        order = chosen.flatten().argsort(stable=True)
        batches = tokens[order // self.experts_per_token].split(self._load_of(chosen).tolist())
        outputs = [
            expert(batch)
            for expert, batch in zip(self.experts, batches, strict=True)
            if self.training or len(batch)
        ]
        served = torch.cat(outputs)[order.argsort()]
        return served.view(*chosen.shape, -1)

    def _serve_densely(self, tokens: Tensor, chosen: Tensor) -> Tensor:
        # How many tokens an expert gets depends on values, and a compiled graph has fixed shapes.
        # So every expert serves every token, num_experts / experts_per_token times the work.
        outputs = torch.stack([expert(tokens) for expert in self.experts], 1)
        return outputs.gather(1, chosen[..., None].expand(-1, -1, tokens.shape[-1]))


def of_all_processes(load: Tensor) -> Tensor:
    """The sum of a count over all processes of `torch.distributed`, if it is initialized."""
    if not (dist.is_available() and dist.is_initialized()):
        return load
    total = load.clone()
    dist.all_reduce(total)
    return total


@contextmanager
def counting_load(model: nn.Module) -> Iterator[list[Tensor]]:
    """Count the tokens that every expert serves inside a with block, exactly.

    Yields:
        Counts, int64 (E,), of each mixture of experts that has a router, first layer first. They
        grow with every forward pass, including those that activation checkpointing repeats.
    """
    layers = [
        module
        for module in model.modules()
        if isinstance(module, MixtureOfExperts) and module.router is not None
    ]
    outer = [layer.load for layer in layers]
    counts = [layer.new_count() for layer in layers]
    for layer, count in zip(layers, counts, strict=True):
        layer.load = count
    try:
        yield counts
    finally:
        for layer, before, count in zip(layers, outer, counts, strict=True):
            layer.load = before if before is None else before.add_(count)


@contextmanager
def uncounted(model: nn.Module) -> Iterator[None]:
    """Exclude a with block from `counting_load`."""
    layers = [module for module in model.modules() if isinstance(module, MixtureOfExperts)]
    counts = [layer.load for layer in layers]
    for layer in layers:
        layer.load = None
    try:
        yield
    finally:
        for layer, count in zip(layers, counts, strict=True):
            layer.load = count
