"""The operator `bkcore::attention`: a matrix-valued source propagated by a resolvent and read out.

Layout
------
    v, hopping   (B, N, H)      potential; hopping i is the bond from site i - 1 to site i
    energy, eta  (H,)           E (callers have subtracted the on-site energy); eta > 0
    query, key   (B, N, H, K)
    value        (B, N, H, U)
    first_g      (B, H, 2)      g of the site before the first: Re, Im; None: there is none (zeros)
    first_psi    (B, H, 2, K, U)
    g            (B, N, H, 2)
    out          (B, N, H, 2, U)
    psi          (B, H, 2, K, U)         after the last site
    checkpoints  (B, H, chunks, 2, K, U) before every 32nd site, for the adjoint; else chunks = 0

All real, of one dtype (float32 or float64) and on one device. Every (b, h) is one chain with the
diagonal A_i = v_i - E - i eta of H - z. As in `bkcore.kernels.ops`,

    g_i   = 1 / (A_i - t_i^2 g_{i-1})
    psi_i = g_i (k_i u_i^T + t_i psi_{i-1}) = g_i w_i         a K x U matrix
    out_i = q_i^T psi_i = sum_j R_ij (q_i . k_j) u_j

with R the last row of the resolvent of the first i + 1 sites (hopping -t): attention whose weights
are entries of a resolvent, in linear time and with a state of fixed size.

Derivative
----------
With cotangents c = dL/dRe - i dL/dIm as in `bkcore.kernels.ops`, from the last site to the first,

    M_i      = q_i (c^out_i)^T + t_{i+1} g_{i+1} M_{i+1}            cotangent of psi_i
    lambda_i = c^g_i + <M_i, w_i> + t_{i+1}^2 P_{i+1},       P_i = lambda_i g_i^2

    dq_i = Re(psi_i c^out_i),     dk_i = Re(g_i M_i u_i),     du_i = Re(g_i M_i^T k_i)
    dt_i = Re(g_i <M_i, psi_{i-1}> + 2 t_i P_i g_{i-1})
    dv_i = -Re P_i,     dE = sum_i Re P_i,     deta = -sum_i Im P_i

where <M, W> = sum_ku M_ku W_ku, so that <M_i, w_i> = k_i^T M_i u_i + t_i <M_i, psi_{i-1}>. The
recurrences start from the cotangent of the last psi (and of the last g, which `out` g carries) and
end in those of the first state: c^first_psi = t_0 g_0 M_0, c^first_g = t_0^2 P_0.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bkcore.errors import DTypeError, ShapeError
from bkcore.kernels.backend import ATTENTION_CHUNK
from bkcore.kernels.checks import Expected, check_tensors
from bkcore.kernels.ops import library, no_second_derivative
from bkcore.kernels.selection import keep_choice, kept_choice, select

library.define(
    "attention(Tensor v, Tensor hopping, Tensor energy, Tensor eta, Tensor query, Tensor key,"
    " Tensor value, Tensor? first_g, Tensor? first_psi, bool keep)"
    " -> (Tensor, Tensor, Tensor, Tensor)"
)
library.define(
    "attention_backward(Tensor dg, Tensor dout, Tensor dpsi, Tensor v, Tensor hopping,"
    " Tensor energy, Tensor eta, Tensor query, Tensor key, Tensor value, Tensor? first_g, Tensor g,"
    " Tensor checkpoints)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)

_FLOATS = (torch.float32, torch.float64)


def attention(
    v: Tensor,
    hopping: Tensor,
    energy: Tensor,
    eta: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    first_g: Tensor | None = None,
    first_psi: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Propagate key value^T along every chain and read it with the query; see this module's text.

    Differentiable once in every tensor. A sequence cut in two, the second part started from the
    state that the first left, gives the same bits as in one piece, except in Triton, which works in
    chunks and gives the same to rounding.

    Returns:
        g (B, N, H, 2), out (B, N, H, 2, U) and the last psi (B, H, 2, K, U).

    Raises:
        ShapeError, DTypeError, InputError: the tensors do not fit together.
        BackendError: a forced backend is absent or cannot take the tensors.
    """
    tensors = (v, hopping, energy, eta, query, key, value, first_g, first_psi)
    # The checkpoints are as large as the states of every 32nd site: only for a backward pass.
    keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    g, out, psi, _ = torch.ops.bkcore.attention.default(*tensors, keep)
    return g, out, psi


def check_attention(
    v: Tensor,
    hopping: Tensor,
    energy: Tensor,
    eta: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    first_g: Tensor | None,
    first_psi: Tensor | None,
) -> None:
    """Raise if the tensors of an attention do not fit together."""
    if v.dtype not in _FLOATS:
        raise DTypeError(f"v must be float32 or float64, got {v.dtype}")
    if v.ndim != 3 or v.shape[1] < 1:
        raise ShapeError(f"v must be (B, N, H) with N >= 1, got {tuple(v.shape)}")
    if query.ndim != 4 or value.ndim != 4:
        raise ShapeError(
            "query and value must be (B, N, H, K) and (B, N, H, U), got "
            f"{tuple(query.shape)} and {tuple(value.shape)}"
        )
    check_tensors(
        _expected(v, hopping, energy, eta, query, key, value, first_g, first_psi),
        v.device,
        lambda: f"for v of {v.dtype} and shape {tuple(v.shape)}",
    )


def _expected(
    v: Tensor,
    hopping: Tensor,
    energy: Tensor,
    eta: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    first_g: Tensor | None,
    first_psi: Tensor | None,
) -> dict[str, Expected]:
    batch, _, heads = v.shape
    keys, values = query.shape[3], value.shape[3]
    return {
        "v": (v, v.shape, v.dtype),
        "hopping": (hopping, v.shape, v.dtype),
        "energy": (energy, (heads,), v.dtype),
        "eta": (eta, (heads,), v.dtype),
        "query": (query, (*v.shape, keys), v.dtype),
        "key": (key, (*v.shape, keys), v.dtype),
        "value": (value, (*v.shape, values), v.dtype),
        "first_g": (first_g, (batch, heads, 2), v.dtype),
        "first_psi": (first_psi, (batch, heads, 2, keys, values), v.dtype),
    }


def _check_backward(
    dg: Tensor,
    dout: Tensor,
    dpsi: Tensor,
    v: Tensor,
    hopping: Tensor,
    energy: Tensor,
    eta: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    first_g: Tensor | None,
    g: Tensor,
    checkpoints: Tensor,
) -> None:
    check_attention(v, hopping, energy, eta, query, key, value, first_g, None)
    of_g, of_out, of_psi, of_checkpoints = attention_shapes(v, query, value, keep=True)
    check_tensors(
        {
            "dg": (dg, of_g, v.dtype),
            "dout": (dout, of_out, v.dtype),
            "dpsi": (dpsi, of_psi, v.dtype),
            "g": (g, of_g, v.dtype),
            "checkpoints": (checkpoints, of_checkpoints, v.dtype),
        },
        v.device,
        lambda: f"for v of {v.dtype} and shape {tuple(v.shape)} in a forward pass with keep=True",
    )


def _plain(x: Tensor) -> Tensor:
    return x.resolve_neg().contiguous()


def _attention(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_attention(*args[:-1])
    laid_out: list[Any] = [_plain(x) if isinstance(x, Tensor) else x for x in args]
    return select(laid_out[0]).attention(*laid_out)


def _attention_backward(*tensors: Any) -> tuple[Tensor, ...]:
    _check_backward(*tensors)
    laid_out: list[Any] = [None if x is None else _plain(x) for x in tensors]
    return select(laid_out[0]).attention_backward(*laid_out)


def attention_shapes(v: Tensor, query: Tensor, value: Tensor, keep: bool) -> list[tuple[int, ...]]:
    """Shapes of g, out, psi and the checkpoints."""
    batch, sites, heads = v.shape
    keys, values = query.shape[3], value.shape[3]
    chunks = -(-sites // ATTENTION_CHUNK) if keep else 0
    return [
        (batch, sites, heads, 2),
        (batch, sites, heads, 2, values),
        (batch, heads, 2, keys, values),
        (batch, heads, chunks, 2, keys, values),
    ]


def _attention_fake(*args: Any) -> tuple[Tensor, ...]:
    *tensors, keep = args
    check_attention(*tensors)
    v, query, value = tensors[0], tensors[4], tensors[6]
    return tuple(v.new_empty(shape) for shape in attention_shapes(v, query, value, keep))


def _attention_backward_fake(*tensors: Any) -> tuple[Tensor, ...]:
    _check_backward(*tensors)
    v, hopping, energy, eta, query, key, value = tensors[3:10]
    batch, _, heads = v.shape
    first_g = v.new_empty(batch, heads, 2)
    like = (v, hopping, energy, eta, query, key, value, first_g, tensors[2])
    return tuple(x.new_empty(x.shape) for x in like)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, first_g, first_psi, _ = inputs
    g, _, _, checkpoints = output
    ctx.mark_non_differentiable(checkpoints)
    ctx.save_for_backward(*tensors, first_g, g, checkpoints)
    ctx.started = (first_g is not None, first_psi is not None)
    keep_choice(ctx)


def _backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    with kept_choice(ctx):
        results = torch.ops.bkcore.attention_backward.default(*grads[:3], *ctx.saved_tensors)
    *rest, first_g, first_psi = results
    has_g, has_psi = ctx.started
    return *rest, first_g if has_g else None, first_psi if has_psi else None, None


library.impl("attention", _attention, "CompositeExplicitAutograd")
library.impl("attention_backward", _attention_backward, "CompositeExplicitAutograd")
torch.library.register_fake("bkcore::attention", _attention_fake, lib=library)
torch.library.register_fake("bkcore::attention_backward", _attention_backward_fake, lib=library)
torch.library.register_autograd(
    "bkcore::attention", _backward, setup_context=_setup_context, lib=library
)
torch.library.register_autograd("bkcore::attention_backward", no_second_derivative, lib=library)
