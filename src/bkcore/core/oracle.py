"""Dense complex128 resolvents: O(N^3), for tests only, sharing no code with the sweeps.

v, source: real (N,). z: complex number or (N,). hopping: number or (N - 1,).
onsite: number or (N,).
"""

from __future__ import annotations

import torch
from torch import Tensor


def hamiltonian(
    v: Tensor, *, hopping: float | Tensor = 1.0, onsite: float | Tensor = -2.0
) -> Tensor:
    """H0 + diag(v) as a complex128 matrix (N, N)."""
    v = v.to(torch.float64)
    bonds = torch.as_tensor(hopping, dtype=torch.float64).expand(max(v.shape[0] - 1, 0))
    matrix = torch.diag(v + onsite) + torch.diag(bonds, 1) + torch.diag(bonds, -1)
    return matrix.to(torch.complex128)


def resolvent(
    v: Tensor,
    z: complex | Tensor,
    *,
    hopping: float | Tensor = 1.0,
    onsite: float | Tensor = -2.0,
) -> Tensor:
    """The whole matrix (H - z)^-1, (N, N)."""
    shift = torch.as_tensor(z, dtype=torch.complex128).expand(v.shape[0])
    return torch.linalg.inv(hamiltonian(v, hopping=hopping, onsite=onsite) - torch.diag(shift))


def diagonal(
    v: Tensor,
    z: complex | Tensor,
    *,
    hopping: float | Tensor = 1.0,
    onsite: float | Tensor = -2.0,
) -> Tensor:
    """The two-sided G_ii, (N,)."""
    return resolvent(v, z, hopping=hopping, onsite=onsite).diagonal()


def left_connected(
    v: Tensor,
    z: complex | Tensor,
    *,
    hopping: float | Tensor = 1.0,
    onsite: float | Tensor = -2.0,
) -> Tensor:
    """g_i: the last diagonal entry of the resolvent of the first i + 1 sites, (N,)."""
    blocks = _leading_resolvents(v, z, hopping, onsite)
    return torch.stack([block[-1, -1] for block in blocks])


def propagated(
    v: Tensor,
    source: Tensor,
    z: complex | Tensor,
    *,
    hopping: float | Tensor = 1.0,
    onsite: float | Tensor = -2.0,
) -> Tensor:
    """psi_i: the last entry of the leading resolvent, hopping -t, applied to the source, (N,)."""
    blocks = _leading_resolvents(v, z, -1 * torch.as_tensor(hopping), onsite)
    source = source.to(torch.complex128)
    return torch.stack([block[-1] @ source[: len(block)] for block in blocks])


def _leading_resolvents(
    v: Tensor, z: complex | Tensor, hopping: float | Tensor, onsite: float | Tensor
) -> list[Tensor]:
    shift = torch.as_tensor(z, dtype=torch.complex128).expand(v.shape[0])
    shifted = hamiltonian(v, hopping=hopping, onsite=onsite) - torch.diag(shift)
    return [torch.linalg.inv(shifted[:n, :n]) for n in range(1, v.shape[0] + 1)]
