"""Chains for the tests of the operator: random ones, their dense matrices, and tolerances.

`U` is the unit round-off. The two-sweep solve has a backward error of a few U relative to the
norm of H - z, and ||(H - z)^-1|| <= 1/eta, so a solution is off by a few U ||H - z|| / eta of
||b|| / eta. `forward` states that tolerance; whatever needs another one says so where it stands.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

U = torch.finfo(torch.float64).eps / 2
FEW = 64.0

quick = settings(max_examples=40)
sizes = st.integers(1, 24)
seeds = st.integers(0, 2**31)
etas = st.floats(0.05, 3.0)
energies = st.floats(-6.0, 2.0)
sigmas = st.sampled_from([0.1, 1.0, 5.0])


def potential(seed: int, n: int, sigma: float) -> Tensor:
    """Gaussian disorder in which every eighth site vanishes, so that sgn(0) is met too."""
    v = sigma * torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    v[::8] = 0.0
    return v


def bonds(seed: int, n: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed + 1)
    return 1.5 * torch.randn(n - 1, dtype=torch.float64, generator=generator)


def vector(seed: int, n: int) -> Tensor:
    return torch.randn(n, dtype=torch.complex128, generator=torch.Generator().manual_seed(seed + 2))


def dense(v: Tensor, hopping: Tensor) -> Tensor:
    """H as a matrix, on-site -2."""
    return torch.diag(v - 2.0) + torch.diag(hopping, 1) + torch.diag(hopping, -1)


def resolvent(v: Tensor, z: complex, hopping: Tensor) -> Tensor:
    n = v.shape[-1]
    return torch.linalg.inv(dense(v, hopping) - z * torch.eye(n, dtype=torch.complex128))


def matrix_of(apply: Callable[[Tensor], Tensor], n: int) -> Tensor:
    """The matrix of a linear map, column by column."""
    return apply(torch.eye(n, dtype=torch.complex128)).mT


def forward(v: Tensor, z: complex, hopping: Tensor) -> float:
    """Relative to ||b|| / eta; see the top of the file."""
    norm = float(v.abs().max() + 2.0 + abs(z) + 2.0 * hopping.abs().sum().clamp(max=8.0))
    return FEW * U * norm / z.imag
