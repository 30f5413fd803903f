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
diagonal A_i = v_i - E - i eta of H - z. As in `bkcore.kernels.ops.sweep`,

    g_i   = 1 / (A_i - t_i^2 g_{i-1})
    psi_i = g_i (k_i u_i^T + t_i psi_{i-1}) = g_i w_i         a K x U matrix
    out_i = q_i^T psi_i = sum_j R_ij (q_i . k_j) u_j

with R the last row of the resolvent of the first i + 1 sites (hopping -t): attention whose weights
are entries of a resolvent, in linear time and with a state of fixed size.

Derivative
----------
With cotangents c = dL/dRe - i dL/dIm as in `bkcore.kernels.ops.sweep`, from the last site on,

    M_i      = q_i (c^out_i)^T + t_{i+1} g_{i+1} M_{i+1}            cotangent of psi_i
    lambda_i = c^g_i + <M_i, w_i> + t_{i+1}^2 P_{i+1},       P_i = lambda_i g_i^2

    dq_i = Re(psi_i c^out_i),     dk_i = Re(g_i M_i u_i),     du_i = Re(g_i M_i^T k_i)
    dt_i = Re(g_i <M_i, psi_{i-1}> + 2 t_i P_i g_{i-1})
    dv_i = -Re P_i,     dE = sum_i Re P_i,     deta = -sum_i Im P_i

where <M, W> = sum_ku M_ku W_ku, so that <M_i, w_i> = k_i^T M_i u_i + t_i <M_i, psi_{i-1}>. The
recurrences start from the cotangent of the last psi (and of the last g, which `out` g carries) and
end in those of the first state: c^first_psi = t_0 g_0 M_0, c^first_g = t_0^2 P_0.

The CPU backend takes numbers of psi_{i-1} below twice the smallest normal number for 0.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bkcore.errors import DTypeError, ShapeError
from bkcore.kernels.backends.interface import (
    Attention,
    AttentionBackward,
    AttentionGradients,
    AttentionResults,
    Backend,
    attention_shapes,
    empty_attention_gradients,
)
from bkcore.kernels.checks import check_tensors
from bkcore.kernels.ops.contract import define, define_derivative

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

    Differentiable once in every tensor. If a sequence is cut in two, and the second part starts
    from the final state of the first, the result has the same bits as in one piece; with Triton,
    which works in chunks, it is equal up to rounding.

    Returns:
        g (B, N, H, 2), out (B, N, H, 2, U) and the last psi (B, H, 2, K, U).

    Raises:
        ShapeError, DTypeError, InputError: if the tensors do not fit together.
        BackendError: if a forced backend is not available or cannot take the tensors.
    """
    tensors = (v, hopping, energy, eta, query, key, value, first_g, first_psi)
    # The checkpoints hold the state of every 32nd site, so keep them only for a backward pass.
    keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    g, out, psi, _ = torch.ops.bkcore.attention.default(*tensors, keep)
    return g, out, psi


def check_attention(args: Attention) -> Attention:
    """Raise if the tensors of an attention do not fit together."""
    v, query, value = args.v, args.query, args.value
    if v.dtype not in _FLOATS:
        raise DTypeError(f"v must be float32 or float64, not {v.dtype}")
    if v.ndim != 3 or v.shape[1] < 1:
        raise ShapeError(f"v must be (B, N, H) with N >= 1, not {tuple(v.shape)}")
    if query.ndim != 4 or value.ndim != 4:
        raise ShapeError(
            "query and value must be (B, N, H, K) and (B, N, H, U), not "
            f"{tuple(query.shape)} and {tuple(value.shape)}"
        )
    batch, _, heads = v.shape
    keys, values = query.shape[3], value.shape[3]
    check_tensors(
        {
            "v": (v, v.shape, v.dtype),
            "hopping": (args.hopping, v.shape, v.dtype),
            "energy": (args.energy, (heads,), v.dtype),
            "eta": (args.eta, (heads,), v.dtype),
            "query": (query, (*v.shape, keys), v.dtype),
            "key": (args.key, (*v.shape, keys), v.dtype),
            "value": (value, (*v.shape, values), v.dtype),
            "first_g": (args.first_g, (batch, heads, 2), v.dtype),
            "first_psi": (args.first_psi, (batch, heads, 2, keys, values), v.dtype),
        },
        v.device,
        lambda: f"for v of {v.dtype} and shape {tuple(v.shape)}",
    )
    return args


def _check_backward(args: AttentionBackward) -> AttentionBackward:
    v = args.v
    chains = v, args.hopping, args.energy, args.eta
    forward = Attention(*chains, args.query, args.key, args.value, args.first_g, None, keep=True)
    of_g, of_out, of_psi, of_checkpoints = attention_shapes(check_attention(forward))
    check_tensors(
        {
            "dg": (args.dg, of_g, v.dtype),
            "dout": (args.dout, of_out, v.dtype),
            "dpsi": (args.dpsi, of_psi, v.dtype),
            "g": (args.g, of_g, v.dtype),
            "checkpoints": (args.checkpoints, of_checkpoints, v.dtype),
        },
        v.device,
        lambda: f"for v of {v.dtype} and shape {tuple(v.shape)} in a forward pass with keep=True",
    )
    return args


def _plain(x: Any) -> Any:
    return x.resolve_neg().contiguous() if isinstance(x, Tensor) else x


def _run(backend: Backend, args: Attention) -> AttentionResults:
    return backend.attention(Attention(*map(_plain, args)))


def _run_backward(backend: Backend, args: AttentionBackward) -> AttentionGradients:
    return backend.attention_backward(AttentionBackward(*map(_plain, args)))


def _like(args: Attention) -> AttentionResults:
    return AttentionResults(*(args.v.new_empty(shape) for shape in attention_shapes(args)))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, first_g, first_psi, _ = inputs
    g, _, _, checkpoints = AttentionResults(*output)
    ctx.mark_non_differentiable(checkpoints)
    ctx.save_for_backward(*tensors, first_g, g, checkpoints)
    ctx.started = (first_g is not None, first_psi is not None)


def _backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    results = torch.ops.bkcore.attention_backward.default(*grads[:3], *ctx.saved_tensors)
    *rest, first_g, first_psi = AttentionGradients(*results)
    has_g, has_psi = ctx.started
    return *rest, first_g if has_g else None, first_psi if has_psi else None, None


define("attention", Attention, check_attention, _run, _like, results=4)
define(
    "attention_backward",
    AttentionBackward,
    _check_backward,
    _run_backward,
    empty_attention_gradients,
    results=9,
)
define_derivative("attention", _setup_context, _backward)
