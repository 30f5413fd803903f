"""Resolvent attention: attention whose weights are entries of a resolvent, in linear time."""

from __future__ import annotations

import torch
from torch import Tensor

from bkcore.core.resolvent import require_positive, require_real_float
from bkcore.kernels import attention


def resolvent_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    hopping: Tensor,
    potential: Tensor,
    eta: Tensor,
    state: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Read what earlier sites wrote, by the last row of the resolvent of the sites so far.

    With R the last row of (H - i eta)^-1 of the first i + 1 sites (hopping -t: a change of gauge),

        out_i = sum_{j <= i} R_ij (q_i . k_j) u_j.

    H has the bonds t_i from site i - 1 to i and the on-site energies 1 + t_i^2 + potential_i. At
    potential 0 that is H = L L^T with L bidiagonal, 1 on its diagonal and -t_i beside it: the
    Cholesky factor of a tridiagonal matrix (Golub and Van Loan, "Matrix Computations", section
    4.3.6). Then g_i = 1 up to eta, R_ij = t_{j+1} ... t_i, and t_i in [0, 1] is a forget gate, as
    in gated linear attention (Yang et al., ICML 2024). A positive potential is a barrier: it
    weakens what is behind it. A negative one can bind, and then scatters everything that comes by.

    The first site has no bond to the left: its t is taken as 0 unless a `state` says what is there.
    Differentiable once in every tensor, the state included. float16 and bfloat16 are computed in
    float32, under autocast too, as is everything else that is not float64.

    Args:
        query, key: real (B, N, H, K), N >= 1; every one of H heads is a chain of its own.
        value: (B, N, H, U).
        hopping: (B, N, H), t_i.
        potential: (B, N, H), in units of the hopping 1.
        eta: (H,), positive: the broadening, Im z.
        state: what an earlier call returned; the sequence goes on from there, bit for bit. A chain
            whose g is 0 has no site yet, and begins as without a state.

    Returns:
        out, complex (B, N, H, U); g, complex (B, N, H), the last diagonal entry of each resolvent;
        and the state after the last site, real tensors (B, H, 2) and (B, H, 2, K, U), whose size
        does not depend on N.

    Raises:
        ShapeError: the tensors do not fit together.
        DTypeError: a tensor is complex, or value is of integers.
        InputError: eta is not positive (checked on the CPU).
    """
    for name, x in {"query": query, "key": key, "value": value, "hopping": hopping}.items():
        require_real_float(name, x)
    require_real_float("potential", potential)
    require_positive("eta", eta)
    dtype = torch.float64 if value.dtype == torch.float64 else torch.float32
    query, key, value, hopping, potential, eta = (
        x.to(dtype) for x in (query, key, value, hopping, potential, eta)
    )
    first = torch.zeros_like(hopping[:, :1])
    if state is not None:  # g of a site is never 0
        first = hopping[:, :1] * (state[0] != 0).any(-1)[:, None]
    hopping = torch.cat((first, hopping[:, 1:]), 1)
    diagonal = 1 + hopping.square() + potential
    first_g, first_psi = (None, None) if state is None else (x.to(dtype) for x in state)
    g, out, psi = attention(
        diagonal, hopping, torch.zeros_like(eta), eta, query, key, value, first_g, first_psi
    )
    complex_out = torch.complex(out[:, :, :, 0], out[:, :, :, 1])
    return complex_out, torch.view_as_complex(g), (g[:, -1], psi)
