"""Green's functions of tridiagonal Hamiltonians as differentiable functions, in O(N).

H = H0 + diag(v) is tridiagonal: H0 has the on-site energy `onsite` on its diagonal and the hopping
t beside it (the discrete Laplacian by default), and G(z) = (H - z)^-1 for Im z > 0. The continued
fractions are the textbook ones for a chain (Haydock's recursion; `bkcore.kernels.ops` has
the formulas and their derivative).

All functions compute in float32, or in float64 if v (or the source) is float64: bfloat16 and
float16 are converted, under autocast too, and parameters take the dtype of v. Gradients are exact,
once differentiable, and reach every tensor argument.

Values of Im z are checked where that costs nothing to speak of: numbers always, tensors on the CPU
outside of tracing. On a GPU the check would wait for the device at every call, and is left out: an
Im z <= 0 there gives meaningless numbers.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bkcore.errors import DTypeError, InputError, ShapeError
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

    All leading dimensions broadcast against each other, so that v of shape (N,) and z of shape
    (M, 1) give one diagonal per energy, (M, N). A last dimension of 1 is shared by all sites.

    Args:
        v: real potential (..., N), N >= 1.
        z: complex number or tensor (..., N) or (..., 1), Im z > 0.
        hopping: number or real tensor (..., N - 1) or (..., 1); of any sign, 0 cuts the chain.
        onsite: number or real tensor (..., N) or (..., 1).
        causal: give the left-connected g_i instead, the last diagonal entry of the resolvent of
            the first i + 1 sites, which depends on v_0 ... v_i only.

    Returns:
        complex (..., N): complex64, or complex128 for float64 v. Every value lies in the disc
        |G - i/(2 eta)| <= 1/(2 eta) if Im z = eta is the same for all sites.

    Raises:
        DTypeError: v, hopping or onsite is complex, or v is an integer tensor.
        InputError: Im z <= 0.
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
    require_real_float("v", v)
    if v.ndim < 1 or v.shape[-1] < 1:
        raise ShapeError(f"v must be (..., N) with N >= 1, got {tuple(v.shape)}")
    sites = v.shape[-1]
    real, eta = _split_z(z)
    energy = _difference(real, onsite)
    lead = _leading_shape({"v": v, "z": energy, "Im z": eta, "hopping": hopping})
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
    # Already in this order in memory, if there is anything, since v was passed chain by chain.
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
    """Left-connected Green's function g, and with a source the propagated psi, as complex tensors.

    See `causal_sweep_parts`, which takes the same arguments and copies nothing.

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

    g_i = 1 / (v_i + onsite - E - i eta - t^2 g_{i-1}) and psi_i = g_i (b_i + t psi_{i-1}): site i
    depends on sites 0 ... i only.

    Args:
        v: real potential (B, N, H), channels last, N >= 1.
        source: b, real (B, N, H); None leaves psi out.
        energy, hopping, onsite: number, or real tensor () or (H,).
        eta: number, or real tensor () or (H,), > 0.

    Returns:
        real (B, N, C, H), contiguous: [Re g, Im g], or [Re g, Im g, Re psi, Im psi] with a source,
        so that (B, N, C * H) is a view. float32, or float64 if v or the source is.

    Raises:
        DTypeError: a tensor is complex, or v or the source is an integer tensor.
        InputError: eta <= 0.
        ShapeError: N = 0, or the shapes do not fit.
    """
    require_real_float("v", v)
    if v.ndim != 3 or v.shape[1] < 1:
        raise ShapeError(f"v must be (B, N, H) with N >= 1, got {tuple(v.shape)}")
    dtype = _compute_dtype(v)
    if source is not None:
        require_real_float("source", source)
        if source.shape != v.shape:
            raise ShapeError(
                f"source must have the shape of v, {tuple(v.shape)}, got {tuple(source.shape)}"
            )
        dtype = torch.promote_types(dtype, _compute_dtype(source))
    require_positive("eta", eta)
    if any(x is not None and x.dtype != torch.bfloat16 for x in (v, source)):
        v, source = v.to(dtype), None if source is None else source.to(dtype)
    return sweep(
        v,
        source,
        _channels("energy or onsite", _difference(energy, onsite), v),
        _channels("eta", eta, v).unsqueeze(0),
        _channels("hopping", hopping, v).unsqueeze(0),
    )


def _compute_dtype(v: Tensor) -> torch.dtype:
    return torch.float64 if v.dtype == torch.float64 else torch.float32


def require_real_float(name: str, value: Tensor) -> None:
    if not isinstance(value, Tensor):
        raise DTypeError(
            f"{name} must be a torch.Tensor, got {type(value).__name__}; use torch.as_tensor()"
        )
    if value.is_complex():
        raise DTypeError(f"{name} must be real, got {value.dtype}; a potential is real: use .real")
    if not value.is_floating_point():
        raise DTypeError(f"{name} must be a floating-point tensor, got {value.dtype}; use .float()")


def _split_z(z: complex | Tensor) -> tuple[float | Tensor, float | Tensor]:
    """Real and imaginary part of z, the latter checked."""
    if isinstance(z, Tensor) and not z.is_complex():
        raise InputError(f"z must be complex with Im z > 0, got a real tensor ({z.dtype})")
    z = z if isinstance(z, Tensor) else complex(z)
    require_positive("Im z", z.imag)
    return z.real, z.imag


def require_positive(name: str, value: float | Tensor) -> None:
    if not isinstance(value, Tensor):
        smallest, good = value, value > 0
    elif _is_cheap_to_read(value):
        smallest = value.min().item()
        good = not smallest <= 0  # a tensor may hold NaN, which goes through
    else:
        return
    if not good:
        raise InputError(
            f"{name} must be > 0, got {smallest}: the resolvent is taken in the upper half plane; "
            "give the energy a positive imaginary part, such as z = 1j"
        )


def _is_cheap_to_read(value: Tensor) -> bool:
    plain = type(value) in (Tensor, torch.nn.Parameter)
    on_cpu = value.device.type == "cpu" and value.numel() > 0
    return plain and on_cpu and not torch.compiler.is_compiling()


def _difference(energy: float | Tensor, onsite: float | Tensor) -> float | Tensor:
    try:
        return energy - onsite
    except RuntimeError as error:
        raise ShapeError(f"energy and onsite do not broadcast: {error}") from None


def _leading_shape(arguments: dict[str, float | Tensor]) -> torch.Size:
    shapes = {k: x.shape[:-1] for k, x in arguments.items() if isinstance(x, Tensor)}
    try:
        return torch.broadcast_shapes(*shapes.values())
    except RuntimeError:
        listed = ", ".join(f"{k} {tuple(s)}" for k, s in shapes.items())
        raise ShapeError(f"leading dimensions do not broadcast: {listed}") from None


def _rows(name: str, value: float | Tensor, lead: torch.Size, sites: int, like: Tensor) -> Tensor:
    """(..., sites) or (..., 1) as (sites, lanes) or (1, lanes), in the dtype to compute in."""
    dtype, lanes = _compute_dtype(like), math.prod(lead)
    if isinstance(value, complex):
        raise DTypeError(f"{name} must be real, got {value}")
    if not isinstance(value, Tensor):
        return torch.full((1, lanes), value, dtype=dtype, device=like.device)
    if value.is_complex():
        raise DTypeError(f"{name} must be real, got {value.dtype}")
    if value.ndim == 0:
        return value.to(dtype=dtype, device=like.device).expand(1, lanes)
    last = value.shape[-1]
    if last == 0 and sites == 0:
        return torch.zeros((1, lanes), dtype=dtype, device=like.device)
    if last not in (1, sites):
        raise ShapeError(
            f"the last dimension of {name} must be {sites} or 1, got {tuple(value.shape)}"
        )
    value = value.to(dtype)
    if value.numel() == last:  # shared by all chains: no need to write it out for each
        return value.reshape(last, 1).expand(last, lanes)
    return value.expand(*lead, last).reshape(lanes, last).t()


def _channels(name: str, value: float | Tensor, v: Tensor) -> Tensor:
    """A number or a tensor () or (H,) as (H,), on the device of v, in the dtype to compute in."""
    lanes, dtype = v.shape[2], _compute_dtype(v)
    if not isinstance(value, Tensor):
        return v.new_full((lanes,), value, dtype=dtype)
    if value.is_complex():
        raise DTypeError(f"{name} must be real, got {value.dtype}")
    if value.ndim == 0:
        return value.to(device=v.device, dtype=dtype).expand(lanes)
    if value.shape != (lanes,):
        raise ShapeError(f"{name} must be a number or ({lanes},), got {tuple(value.shape)}")
    return value.to(dtype)
