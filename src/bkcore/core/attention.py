"""Resolvent attention: attention whose weights are entries of a resolvent, in linear time."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bkcore.core.arguments import (
    computing_dtype,
    largest_modulus,
    real,
    require_device,
    require_positive,
    require_range,
    require_real_float,
)
from bkcore.errors import DTypeError, ShapeError
from bkcore.kernels import attention


class AttentionInputs(NamedTuple):
    """The arguments of `resolvent_attention` except eta and state, in its order and shapes."""

    query: Tensor
    key: Tensor
    value: Tensor
    hopping: Tensor
    potential: Tensor


def resolvent_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    hopping: Tensor,
    potential: Tensor,
    eta: float | Tensor,
    state: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Read what earlier sites wrote, weighted by the last row of the resolvent of the sites so far.

    With R the last row of (H - i eta)^-1 for the first i + 1 sites (hopping -t: a change of gauge),

        out_i = sum_{j <= i} R_ij (q_i . k_j) u_j.

    H has the bonds t_i from site i - 1 to i and the on-site energies 1 + t_i^2 + potential_i. At
    potential 0 that is H = L L^T with L bidiagonal, 1 on its diagonal and -t_i beside it: the
    Cholesky factor of a tridiagonal matrix (Golub and Van Loan, "Matrix Computations", section
    4.3.6). Then g_i = 1 up to eta, R_ij = t_{j+1} ... t_i, and t_i in [0, 1] is a forget gate, as
    in gated linear attention (Yang et al., ICML 2024). A positive potential is a barrier: it
    weakens what lies behind it. A negative one can bind a state, and then scatters everything that
    passes.

    The first site has no bond to the left: its t counts as 0 unless a `state` is given. The result
    is differentiable once in every tensor, including the state. Everything that is not float64 is
    computed in float32, including float16 and bfloat16, and also under autocast.

    Args:
        query, key: real (B, N, H, K), N >= 1; each of the H heads is a chain of its own.
        value: (B, N, H, U).
        hopping: (B, N, H), t_i.
        potential: (B, N, H), in units of the hopping 1.
        eta: number, or tensor () or (H,), positive: the broadening, Im z.
        state: the state an earlier call returned; the sequence continues from there, bit for bit. A
            chain whose g is 0 has no sites yet, and starts as if without a state.

    Returns:
        out, complex (B, N, H, U); g, complex (B, N, H), the last diagonal entry of each resolvent;
        and the state after the last site, real tensors (B, H, 2) and (B, H, 2, K, U), whose size
        does not depend on N.

    Raises:
        ShapeError: if the shapes do not fit together.
        DTypeError: if a tensor is complex or of integers, or an argument is not a tensor.
        InputError: if eta is not positive, tensors are on different devices, or the results do not
            fit the dtype of the computation: with M = 1e18 in float32 and 1e150 in float64, eta
            must be between 1/M and M, |potential| and hopping^2 at most M, and hopping^2 at most
            M eta. Values are checked only on the CPU, as in `bkcore.core.resolvent`.
    """
    eta = _check(query, key, value, hopping, potential, eta)
    dtype = computing_dtype(value)
    # One check for all chains: their on-site energies are of order 1.
    bond = largest_modulus(hopping)
    added: dict[str, float | Tensor] = {"potential": potential, "hopping^2": bond * bond}
    require_range(dtype, added, eta, bond, eta_name="eta", tensor="value")
    return attend(query, key, value, hopping, potential, eta, state)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    hopping: Tensor,
    potential: Tensor,
    eta: Tensor,
    state: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """`resolvent_attention` for inputs that fit together, eta (H,), without checking their range.

    For a layer inside a network: a diverged activation affects only its own sequence, whose result
    is then meaningless or NaN. Only eta, a parameter that all sequences share, must be positive.
    """
    require_positive("eta", eta)
    dtype = computing_dtype(value)
    first_g, first_psi = _taken_apart(state, value, key.shape[-1], dtype)
    query, key, value, hopping, potential, eta = (
        x.to(dtype) for x in (query, key, value, hopping, potential, eta)
    )
    first = torch.zeros_like(hopping[:, :1])
    if first_g is not None:  # g of a site is never 0
        first = hopping[:, :1] * (first_g != 0).any(-1)[:, None]
    hopping = torch.cat((first, hopping[:, 1:]), 1)
    diagonal = 1 + hopping.square() + potential
    g, out, psi = attention(
        diagonal, hopping, torch.zeros_like(eta), eta, query, key, value, first_g, first_psi
    )
    complex_out = torch.complex(out[:, :, :, 0], out[:, :, :, 1])
    return complex_out, torch.view_as_complex(g), (g[:, -1], psi)


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    hopping: Tensor,
    potential: Tensor,
    eta: float | Tensor,
) -> Tensor:
    """Raise unless the inputs fit together; return eta as (H,)."""
    tensors = {"query": query, "key": key, "value": value}
    tensors |= {"hopping": hopping, "potential": potential}
    for name, x in tensors.items():
        require_real_float(name, x)
    for name, x in (("query", query), ("value", value)):
        if x.ndim != 4 or x.shape[1] < 1:
            raise ShapeError(f"{name} must have axes (B, N, H, ...), N >= 1, not {tuple(x.shape)}")
    chains = query.shape[:3]
    last = {"query": query.shape[3:], "key": query.shape[3:], "value": value.shape[3:]}
    for name, x in tensors.items():
        shape = (*chains, *last.get(name, ()))
        if x.shape != shape:
            raise ShapeError(
                f"{name} must be {shape} for query of shape {tuple(query.shape)}, "
                f"not {tuple(x.shape)}"
            )
        require_device(name, x, query, "query")
    eta = real("eta", eta, value, "value")
    if not isinstance(eta, Tensor):
        return query.new_full(chains[2:], eta, dtype=torch.float64)
    if eta.shape not in ((), chains[2:]):
        raise ShapeError(f"eta must be a number or {tuple(chains[2:])}, not {tuple(eta.shape)}")
    return eta.to(value.device).expand(chains[2:])


def _taken_apart(
    state: tuple[Tensor, Tensor] | None, value: Tensor, keys: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """Check a state, and return its g and psi."""
    if state is None:
        return None, None
    if not isinstance(state, tuple | list) or len(state) != 2:
        raise DTypeError(f"state must be None or two tensors, not {type(state).__name__}")
    batch, _, heads, values = value.shape
    shapes = ((batch, heads, 2), (batch, heads, 2, keys, values))
    for i, (x, shape) in enumerate(zip(state, shapes, strict=True)):
        require_real_float(f"state[{i}]", x)
        require_device(f"state[{i}]", x, value, "value")
        if x.shape != shape:
            raise ShapeError(f"state[{i}] must be {shape}, not {tuple(x.shape)}")
    return state[0].to(dtype), state[1].to(dtype)
