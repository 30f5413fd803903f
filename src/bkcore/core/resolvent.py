"""Green's functions of tridiagonal Hamiltonians as differentiable functions, in O(N).

H = H0 + diag(v) is tridiagonal: H0 has the on-site energy `onsite` on its diagonal and the hopping
t beside it (the discrete Laplacian by default), and G(z) = (H - z)^-1 for Im z > 0. The continued
fractions are the textbook ones for a chain (Haydock's recursion; `bkcore.kernels.ops.sweep` has
the formulas and their derivative).

All functions compute in float32, or in float64 if v (or the source) is float64. bfloat16 and
float16 are converted, also under autocast, and parameters take the dtype of v. Gradients are exact
and reach every tensor argument; there are no second derivatives.

Values are checked where that costs next to nothing: numbers always, tensors on the CPU outside
tracing and `vmap`. On a GPU the check would synchronize with the device at every call, so it is
left out, and an Im z <= 0 or a value out of range gives meaningless numbers there.

Range. With M = 1e18 in float32 and 1e150 in float64: 1/M <= Im z <= M; |v|, |onsite| and |Re z| up
to M; and t^2 <= M Im z. Anything else is refused (`bkcore.core.arguments` gives the reason).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bkcore.core.arguments import (
    broadcast_leading,
    computing_dtype,
    real,
    require_bool,
    require_device,
    require_range,
    require_real_float,
    split_z,
)
from bkcore.errors import ShapeError
from bkcore.kernels import sweep


def resolvent_diagonal(
    v: Tensor,
    z: complex | Tensor,
    *,
    hopping: float | Tensor = 1.0,
    onsite: float | Tensor = -2.0,
    causal: bool = False,
) -> Tensor:
    """Diagonal of (H - z)^-1 for many chains at once.

    All leading dimensions broadcast against each other, so v of shape (N,) and z of shape (M, 1)
    give one diagonal per energy, (M, N). A last dimension of 1 is shared by all sites.

    Args:
        v: real potential (..., N), N >= 1.
        z: complex number or tensor (..., N) or (..., 1), Im z > 0.
        hopping: number or real tensor (..., N - 1) or (..., 1); of any sign, 0 cuts the chain.
        onsite: number or real tensor (..., N) or (..., 1).
        causal: return the left-connected g_i instead, the last diagonal entry of the resolvent of
            the first i + 1 sites, which depends only on v_0 ... v_i.

    Returns:
        complex (..., N): complex64, or complex128 for float64 v. Every value lies in the disc
        |G - i/(2 eta)| <= 1/(2 eta) if Im z = eta is the same for all sites.

    Raises:
        DTypeError: v, hopping or onsite is complex or not a number, or v is an integer tensor.
        InputError: Im z <= 0, an argument is out of range (see the top of this module), or tensors
            are on different devices.
        ShapeError: N = 0, or the shapes do not broadcast.
    """
    parts = resolvent_diagonal_parts(v, z, hopping=hopping, onsite=onsite, causal=causal)
    return torch.view_as_complex(parts)


def resolvent_diagonal_parts(
    v: Tensor,
    z: complex | Tensor,
    *,
    hopping: float | Tensor = 1.0,
    onsite: float | Tensor = -2.0,
    causal: bool = False,
) -> Tensor:
    """`resolvent_diagonal` as a real, contiguous tensor (..., N, 2) of [Re, Im]."""
    require_bool("causal", causal)
    require_real_float("v", v)
    if v.ndim < 1 or v.shape[-1] < 1:
        raise ShapeError(f"v must be (..., N) with N >= 1, not {tuple(v.shape)}")
    sites = v.shape[-1]
    base, eta = split_z(z, v)
    hopping, onsite = real("hopping", hopping, v), real("onsite", onsite, v)
    energy = _difference(base, onsite)
    lead = broadcast_leading({"v": v, "z or onsite": energy, "Im z": eta, "hopping": hopping})
    require_range(computing_dtype(v), {"v": v, "Re z": base, "onsite": onsite}, eta, hopping)
    v = _rows("v", v, lead, sites, v)
    rows = _rows("z or onsite", energy, lead, sites, v)
    if rows.shape[0] == sites and sites > 1:
        v, rows = v - rows, torch.zeros_like(rows[:1])
    parts = sweep(
        v.unsqueeze(0),
        None,
        rows[0],
        _rows("z", eta, lead, sites, v),
        _rows("hopping", hopping, lead, sites - 1, v),
        two_sided=not causal,
    )
    # Already in this order in memory, unless empty, since v was passed chain by chain.
    chains = parts[0].permute(2, 0, 1)
    if not chains.numel():  # PyTorch calls any empty tensor contiguous, whatever its strides
        chains = chains.clone(memory_format=torch.contiguous_format)
    return chains.contiguous().view(*lead, sites, 2)


def causal_sweep(
    v: Tensor,
    source: Tensor | None = None,
    *,
    energy: float | Tensor,
    eta: float | Tensor,
    hopping: float | Tensor = 1.0,
    onsite: float | Tensor = -2.0,
) -> Tensor | tuple[Tensor, Tensor]:
    """Left-connected Green's function g, and with a source also psi, as complex tensors.

    `causal_sweep_parts` takes the same arguments and copies nothing.

    Returns:
        g, complex (B, N, H); or (g, psi) if a source is given.
    """
    parts = causal_sweep_parts(v, source, energy=energy, eta=eta, hopping=hopping, onsite=onsite)
    g = torch.complex(parts[:, :, 0], parts[:, :, 1])
    if source is None:
        return g
    return g, torch.complex(parts[:, :, 2], parts[:, :, 3])


def causal_sweep_parts(
    v: Tensor,
    source: Tensor | None = None,
    *,
    energy: float | Tensor,
    eta: float | Tensor,
    hopping: float | Tensor = 1.0,
    onsite: float | Tensor = -2.0,
) -> Tensor:
    """One causal sweep along N for every batch element and channel.

    g_i = 1 / (v_i + onsite - E - i eta - t^2 g_{i-1}) and psi_i = g_i (b_i + t psi_{i-1}), so site
    i depends only on sites 0 ... i.

    Args:
        v: real potential (B, N, H), channels last, N >= 1.
        source: b, real (B, N, H); without it there is no psi.
        energy, hopping, onsite: number, or real tensor () or (H,).
        eta: number, or real tensor () or (H,), > 0.

    Returns:
        real (B, N, C, H), contiguous: [Re g, Im g], or [Re g, Im g, Re psi, Im psi] with a source,
        so that (B, N, C * H) is a view. float32, or float64 if v or the source is.

    Raises:
        DTypeError: a tensor is complex, or v or the source is an integer tensor.
        InputError: eta <= 0, an argument is out of range (see the top of this module; Re z is
            energy, Im z is eta), or tensors are on different devices.
        ShapeError: N = 0, or the shapes do not fit.
    """
    require_real_float("v", v)
    if v.ndim != 3 or v.shape[1] < 1:
        raise ShapeError(f"v must be (B, N, H) with N >= 1, not {tuple(v.shape)}")
    if source is not None:
        require_real_float("source", source)
        if source.shape != v.shape:
            raise ShapeError(
                f"source must have the shape of v, {tuple(v.shape)}, not {tuple(source.shape)}"
            )
        require_device("source", source, v)
    dtype = computing_dtype(v, source)
    energy, eta = real("energy", energy, v), real("eta", eta, v)
    hopping, onsite = real("hopping", hopping, v), real("onsite", onsite, v)
    shift = _difference(energy, onsite)
    for name, x in {"energy or onsite": shift, "eta": eta, "hopping": hopping}.items():
        _check_channels(name, x, v)
    added = {"v": v, "energy": energy, "onsite": onsite}
    require_range(dtype, added, _each(eta), _each(hopping), eta_name="eta")
    if any(x is not None and x.dtype != torch.bfloat16 for x in (v, source)):
        v, source = v.to(dtype), None if source is None else source.to(dtype)
    shift, eta, hopping = (_channels(x, v, dtype) for x in (shift, eta, hopping))
    return sweep(v, source, shift, eta.unsqueeze(0), hopping.unsqueeze(0))


def _each(value: float | Tensor) -> float | Tensor:
    """A number unchanged, or the numbers of all channels as chains of one site."""
    return value.unsqueeze(-1) if isinstance(value, Tensor) else value


def _difference(energy: float | Tensor, onsite: float | Tensor) -> float | Tensor:
    try:
        return energy - onsite
    except RuntimeError as error:
        raise ShapeError(f"energy and onsite do not broadcast: {error}") from None


def _rows(name: str, value: float | Tensor, lead: torch.Size, sites: int, like: Tensor) -> Tensor:
    """Turn (..., sites) or (..., 1) into (sites, lanes) or (1, lanes), in the computing dtype."""
    dtype, lanes = computing_dtype(like), math.prod(lead)
    if not isinstance(value, Tensor):
        return torch.full((1, lanes), value, dtype=dtype, device=like.device)
    if value.ndim == 0:
        return value.to(dtype=dtype, device=like.device).expand(1, lanes)
    last = value.shape[-1]
    if last == 0 and sites == 0:
        return torch.zeros((1, lanes), dtype=dtype, device=like.device)
    if last not in (1, sites):
        raise ShapeError(
            f"the last dimension of {name} must be {sites} or 1, not {tuple(value.shape)}"
        )
    value = value.to(dtype)
    if value.numel() == last:  # shared by all chains, so not copied for each
        return value.reshape(last, 1).expand(last, lanes)
    return value.expand(*lead, last).reshape(lanes, last).t()


def _check_channels(name: str, value: float | Tensor, v: Tensor) -> None:
    lanes = v.shape[2]
    if isinstance(value, Tensor) and value.shape not in ((), (lanes,)):
        raise ShapeError(f"{name} must be a number or ({lanes},), not {tuple(value.shape)}")


def _channels(value: float | Tensor, v: Tensor, dtype: torch.dtype) -> Tensor:
    """A number or a tensor () or (H,) as (H,), on v's device, in the computing dtype."""
    if not isinstance(value, Tensor):
        return v.new_full(v.shape[2:], value, dtype=dtype)
    return value.to(device=v.device, dtype=dtype).expand(v.shape[2:])
