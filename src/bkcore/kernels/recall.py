"""The computations of the language model's mixer around resolvent attention, in PyTorch.

With queries and keys of unit length, and for every site i and head of a sequence:

    t_i     = exp(-2 rate sigmoid(gate_i))       the hopping, a forget gate in (0, 1)
    v_i     = height softplus(barrier_i)         the potential, a barrier > 0
    g, out  = resolvent attention of the diagonal 1 + t^2 + v and the hopping t
    w       = Im g / eta                         the memory
    real    = Re out / w^(1/2),   imag = Im out / eta / w^(3/2)
    result  = weight_0 value + weight_1 real + weight_2 imag

By the Ward identity w_i = sum_j |R_ij|^2, with R the last row of the resolvent of the sites so far.
If n sites are remembered equally, R_ij = 1, it is n. Then by the Cauchy-Schwarz inequality,

    |Re out_iu| <= w^(1/2) (sum_j u_ju^2)^(1/2),

so unrelated values keep their size, however many are remembered, while n copies of one value add up
to n^(1/2) times its size. Copies can thus be counted, which a norm after the attention would
prevent. Im R is of first order in eta (it is the last row of eta G G*); its power of w was chosen
because it trains well.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def hopping_and_potential(
    gate: Tensor, barrier: Tensor, rate: Tensor, height: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """t and v of gate and barrier (B, N, H), rate and height (H,), rounded from float64 to dtype.

    PyTorch's vector and scalar code round these functions differently in the last bit, so a stream
    would differ from a whole text. Computed in float64 and then rounded, they agree.
    """
    hopping = torch.exp(-2 * rate * torch.sigmoid(gate.double()))
    potential = height * F.softplus(barrier.double())
    return hopping.to(dtype), potential.to(dtype)


def for_every_head(x: Tensor, heads: int, groups: int) -> Tensor:
    """Repeat what G groups of neighbouring heads share: (B, N, G K) -> (B, N, H, K)."""
    grouped = x.unflatten(-1, (groups, 1, -1))
    return grouped.expand(-1, -1, -1, heads // groups, -1).flatten(2, 3)


def over_memory(real: Tensor, imag: Tensor, memory: Tensor, eta: Tensor) -> tuple[Tensor, Tensor]:
    """`real / w^(1/2)` and `imag / (eta w^(3/2))`: the output, however much is remembered.

    Args:
        real, imag: (B, N, H, U), the output of resolvent attention.
        memory: (B, N, H), w.
        eta: (H,).
    """
    w = memory[..., None]
    # Division rounds correctly everywhere, but PyTorch's float32 square root (MKL's) does not.
    # Computed in float64 and then rounded, it does, and all implementations agree.
    root = w.double().sqrt().to(w.dtype)
    return real / root, imag / eta[:, None] / (w * root)


def features(value: Tensor, real: Tensor, imag: Tensor, weight: Tensor) -> Tensor:
    """The value and both parts of the output, (B, N, W) each, added with weights (3, W)."""
    a, b, c = weight
    return a * value + b * real + c * imag
