"""The operator `bkcore::sweep`: its schema, checks, shapes and exact derivative, in one place.

Layout
------
    v, source  (B, N, H)   real, float32 or float64, all tensors of one dtype and device; or these
                           two bfloat16 and all others float32
    energy     (H,)        E, from which callers have subtracted the on-site energy
    eta        (R, H)      R = 1, or N for one per site; positive
    hopping    (R, H)      R = 1, or N - 1 for one per bond; row i couples sites i and i + 1
    parts      (B, N, C, H)  C = 2: Re, Im of g (or of G_ii); C = 4: Re g, Im g, Re psi, Im psi

Tensors may have any strides, and are copied only if neither the lanes nor the sites of v are
contiguous. The output keeps v's order in memory: contiguous if v's lanes are; if its sites are
(one sequence after the other, as in a transposed (H, N) tensor), it is laid out as (B, H, N, C),
and the parts of a site are a complex number.

Every lane (b, h) is one chain with the diagonal A_i = v_i - E - i eta_i of H - z:

    g_i   = 1 / (A_i - t_{i-1}^2 g_{i-1})               left-connected Green's function
    psi_i = g_i (b_i + t_{i-1} psi_{i-1})               propagated source
    r_i   = 1 / (A_i - t_i^2 r_{i+1})                   right-connected Green's function
    G_ii  = 1 / (A_i - t_{i-1}^2 g_{i-1} - t_i^2 r_{i+1})          two_sided=True

For eta > 0, every denominator has an imaginary part of at most -eta, so nothing needs to be clamped
or rescaled. NaN propagates. Denominators are squared, so their moduli must lie between 1e-18 and
1e18 in float32 (1e-150 and 1e150 in float64).

Derivative
----------
Write the cotangent of a complex output w as c = dL/dRe w - i dL/dIm w, so that dL = Re(sum c dw).
For holomorphic w this c follows the ordinary chain rule, with no conjugation.

Causal. With u_i = b_i + t_{i-1} psi_{i-1}, dpsi_i = u_i dg_i + g_i (db_i + d(t_{i-1} psi_{i-1}))
and dg_i = g_i^2 (-dA_i + d(t_{i-1}^2 g_{i-1})). Hence, from the last site to the first,

    mu_i     = c^psi_i + t_i Q_{i+1},                    Q_i = mu_i g_i
    lambda_i = c^g_i + mu_i u_i + t_i^2 P_{i+1},         P_i = lambda_i g_i^2

    db_i = Re Q_i,    dt_{i-1} = Re(2 t_{i-1} P_i g_{i-1} + Q_i psi_{i-1})

and dL = -Re(P_i dA_i). Neither v, E nor eta is needed, so they are not kept for the backward pass.

Two-sided. G is symmetric and dG = -G dH G, so dG_ii/dA_j = -G_ij^2, and G_ij = -t_i g_i G_{i+1,j}
for i < j (mirrored with r for i > j). The sum over i is therefore a recurrence:

    S_j  = t_{j-1}^2 g_{j-1}^2 (S_{j-1} + c_{j-1}),     S'_j = t_j^2 r_{j+1}^2 (S'_{j+1} + c_{j+1})
    W_j  = sum_i c_i G_ij^2 = G_jj^2 (c_j + S_j + S'_j),          dL = -Re(W_j dA_j)

A bond enters twice: dG_ii/dt_k = -2 G_{i,k} G_{i,k+1}. With G_{i,k+1} = -t_k r_{k+1} G_{i,k} for
i <= k and G_{i,k} = -t_k g_k G_{i,k+1} for i > k,

    dt_k = 2 t_k Re(r_{k+1} G_kk^2 (c_k + S_k) + g_k G_{k+1,k+1}^2 (c_{k+1} + S'_{k+1}))

In both forms dA = dv - dE - i deta, so with X for P or W:

    dv_i = -Re X_i,    dE = sum_i Re X_i,    deta_i = -Im X_i
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, overload

import torch
from torch import Tensor

from bkcore.errors import DTypeError, InputError, ShapeError
from bkcore.kernels.backends.interface import Backend, Sweep, SweepBackward
from bkcore.kernels.checks import Expected, check_tensors
from bkcore.kernels.layout import (
    computed_dtype,
    dense,
    empty_like_sites,
    empty_parts,
    laid_out_like,
    parameter_rows,
)
from bkcore.kernels.ops.contract import define, define_derivative, define_vmap

_FLOATS = (torch.float32, torch.float64, torch.bfloat16)


def sweep(
    v: Tensor,
    source: Tensor | None,
    energy: Tensor,
    eta: Tensor,
    hopping: Tensor,
    two_sided: bool = False,
) -> Tensor:
    """Sweep every lane once; layout, formulas and range are at the top of this module.

    Differentiable once in every tensor. Runs on the backend that `bkcore.kernels` chooses.

    Returns:
        (B, N, C, H), in v's order in memory; C = 2, or 4 with a source. float32 if v is bfloat16.

    Raises:
        ShapeError, DTypeError, InputError: the tensors do not fit together.
        BackendError: a forced backend is not available or cannot take the tensors, or a second
            derivative is requested.
    """
    parts: Tensor = torch.ops.bkcore.sweep.default(v, source, energy, eta, hopping, two_sided)
    return parts


def check_sweep(args: Sweep) -> Sweep:
    """Raise if the tensors of a sweep do not fit together."""
    v = args.v
    if v.dtype not in _FLOATS:
        raise DTypeError(f"v must be float32, float64 or bfloat16, not {v.dtype}")
    if v.ndim != 3 or v.shape[1] < 1:
        raise ShapeError(f"v must be (B, N, H) with N >= 1, not {tuple(v.shape)}")
    check_source(args.two_sided, args.source)

    def why() -> str:
        return f"for v of {v.dtype} and shape {tuple(v.shape)}"

    dtype = computed_dtype(v)
    check_chain(args.energy, args.eta, args.hopping, v.shape[1:], dtype, v.device, why)
    alike: dict[str, Expected] = {
        "v": (v, v.shape, v.dtype),
        "source": (args.source, v.shape, v.dtype),
    }
    check_tensors(alike, v.device, why)
    return args


def check_source(two_sided: bool, source: Tensor | None) -> None:
    """Raise if a two-sided sweep is given a source."""
    if two_sided and source is not None:
        raise InputError("two_sided=True takes no source; only the causal sweep propagates one")


def check_chain(
    energy: Tensor,
    eta: Tensor,
    hopping: Tensor,
    size: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    why: Callable[[], str],
) -> None:
    """Raise unless these are parameters (H,), (R, H), (R, H) of chains of size (N, H)."""
    sites, lanes = size
    for name, x, rows in (("eta", eta, sites), ("hopping", hopping, max(sites - 1, 1))):
        if x.ndim != 2 or x.shape[1] != lanes or x.shape[0] not in (1, rows):
            raise ShapeError(
                f"{name} must be (1, {lanes}) or ({rows}, {lanes}) {why()}, not {tuple(x.shape)}"
            )
    check_tensors(
        {
            "energy": (energy, (lanes,), dtype),
            "eta": (eta, eta.shape, dtype),
            "hopping": (hopping, hopping.shape, dtype),
        },
        device,
        why,
    )


def _check_backward(args: SweepBackward) -> SweepBackward:
    parts = args.parts
    check_source(args.two_sided, args.source)
    if args.two_sided and args.v is None:
        raise InputError("the adjoint of the two-sided sweep needs v, which is None")
    if parts.dtype not in _FLOATS[:2]:
        raise DTypeError(f"parts must be float32 or float64, not {parts.dtype}")
    components = 2 if args.source is None else 4
    if parts.ndim != 4 or parts.shape[1] < 1 or parts.shape[2] != components:
        raise ShapeError(
            f"parts must be (B, N, {components}, H) with N >= 1, not {tuple(parts.shape)}"
        )
    batch, sites, _, lanes = parts.shape

    def why() -> str:
        return f"for parts of {parts.dtype} and shape {tuple(parts.shape)}"

    chain = args.energy, args.eta, args.hopping
    check_chain(*chain, (sites, lanes), parts.dtype, parts.device, why)
    expected: dict[str, Expected] = {
        "parts": (parts, parts.shape, parts.dtype),
        "grad": (args.grad, parts.shape, parts.dtype),
    }
    for name, x in (("v", args.v), ("source", args.source)):
        if x is not None:
            half = x.dtype == torch.bfloat16 and parts.dtype == torch.float32
            dtype = x.dtype if half else parts.dtype
            expected[name] = (x, (batch, sites, lanes), dtype)
    check_tensors(expected, parts.device, why)
    return args


def _run(backend: Backend, args: Sweep) -> Tensor:
    v, source = dense(_readable(backend, args.v)), _readable(backend, args.source)
    source = None if source is None else _ordered_like(v, source)
    eta, hopping = parameter_rows(args.eta), parameter_rows(args.hopping)
    return backend.sweep(Sweep(v, source, args.energy, eta, hopping, args.two_sided))


def _run_backward(backend: Backend, args: SweepBackward) -> tuple[Tensor, ...]:
    v, source = _readable(backend, args.v), _readable(backend, args.source)
    dv, dsource, *parameters = backend.sweep_backward(
        args._replace(
            grad=laid_out_like(args.grad, args.parts),
            v=None if v is None else dense(v),
            source=None if source is None else _ordered_like(args.parts, source),
            eta=parameter_rows(args.eta),
            hopping=parameter_rows(args.hopping),
        )
    )
    return dv, args.parts.new_empty(0) if dsource is None else dsource, *parameters


@overload
def _readable(backend: Backend, x: Tensor) -> Tensor: ...
@overload
def _readable(backend: Backend, x: Tensor | None) -> Tensor | None: ...
def _readable(backend: Backend, x: Tensor | None) -> Tensor | None:
    """x, widened to float32 if it is bfloat16 and the backend cannot read that."""
    if x is None or x.dtype != torch.bfloat16 or backend.reads_bfloat16:
        return x
    return x.float()


def _ordered_like(x: Tensor, source: Tensor) -> Tensor:
    """source with its lanes contiguous where those of x are."""
    return source.contiguous() if x.stride(-1) == 1 and source.stride(-1) != 1 else source


def _like(args: Sweep) -> Tensor:
    return empty_parts(dense(args.v), 2 if args.source is None else 4)


def _like_backward(args: SweepBackward) -> tuple[Tensor, ...]:
    dv = empty_like_sites(args.parts)
    dsource = args.parts.new_empty(0) if args.source is None else torch.empty_like(dv)
    parameters = (args.energy, args.eta, args.hopping)
    return dv, dsource, *(args.parts.new_empty(x.shape) for x in parameters)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    args = Sweep(*inputs)
    kept_v = args.v if args.two_sided else None
    ctx.save_for_backward(output, kept_v, args.source, args.energy, args.eta, args.hopping)
    ctx.two_sided, ctx.dtype = args.two_sided, args.v.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    parts, v, source, energy, eta, hopping = ctx.saved_tensors
    dv, dsource, *parameters = torch.ops.bkcore.sweep_backward.default(
        grad, parts, v, source, energy, eta, hopping, ctx.two_sided
    )
    dsource = None if source is None else dsource.to(ctx.dtype)
    return dv.to(ctx.dtype), dsource, *parameters, None


def _fold(x: Tensor | None, dim: int | None, size: int) -> Tensor | None:
    """Move a mapped dimension into the lanes, the last ones of x: (..., H) -> (..., size * H)."""
    if x is None:
        return None
    mapped = x.unsqueeze(-2) if dim is None else x.movedim(dim, 0).movedim(0, -2)
    return mapped.expand(*mapped.shape[:-2], size, mapped.shape[-1]).flatten(-2)


def _unfold(x: Tensor, size: int) -> Tensor:
    """Inverse of `_fold`, the mapped dimension first."""
    return x.unflatten(-1, (size, -1)).movedim(-2, 0)


def _folded(info: Any, in_dims: tuple[int | None, ...], tensors: list[Any]) -> list[Any]:
    """The arguments with the mapped dimension moved into the lanes, which are independent and have
    their own parameter values."""
    return [_fold(x, dim, info.batch_size) for x, dim in zip(tensors, in_dims, strict=False)]


def _vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Tensor, int]:
    *tensors, two_sided = args
    parts = torch.ops.bkcore.sweep.default(*_folded(info, in_dims, tensors), two_sided)
    return _unfold(parts, info.batch_size), 0


def _vmap_backward(
    info: Any, in_dims: tuple[int | None, ...], *args: Any
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    *tensors, two_sided = args
    size, folded = info.batch_size, _folded(info, in_dims, tensors)
    gradients = torch.ops.bkcore.sweep_backward.default(*folded, two_sided)
    return tuple(_unfold(x, size) if x.numel() else x.expand(size, 0) for x in gradients), (0,) * 5


define("sweep", Sweep, check_sweep, _run, _like)
define("sweep_backward", SweepBackward, _check_backward, _run_backward, _like_backward, results=5)
define_derivative("sweep", _setup_context, _backward)
define_vmap("sweep", _vmap)
define_vmap("sweep_backward", _vmap_backward)
