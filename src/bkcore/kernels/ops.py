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

For eta > 0 every denominator has an imaginary part of at most -eta, so that nothing needs to be
clamped or rescaled. NaN goes through. Denominators are squared: their moduli have to lie between
1e-18 and 1e18 in float32 (1e-150 and 1e150 in float64).

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
from typing import Any, NoReturn, overload

import torch
from torch import Tensor

from bkcore.errors import BackendError, DTypeError, InputError, ShapeError
from bkcore.kernels.backend import (
    Backend,
    computed_dtype,
    empty_like_sites,
    empty_parts,
    sites_last,
)
from bkcore.kernels.checks import Expected, check_tensors
from bkcore.kernels.selection import keep_choice, kept_choice, select

library = torch.library.Library("bkcore", "FRAGMENT")
library.define(
    "sweep(Tensor v, Tensor? source, Tensor energy, Tensor eta, Tensor hopping, bool two_sided)"
    " -> Tensor"
)
library.define(
    "sweep_backward(Tensor grad, Tensor parts, Tensor? v, Tensor? source, Tensor energy,"
    " Tensor eta, Tensor hopping, bool two_sided) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)

_FLOATS = (torch.float32, torch.float64, torch.bfloat16)


def sweep(
    v: Tensor,
    source: Tensor | None,
    energy: Tensor,
    eta: Tensor,
    hopping: Tensor,
    two_sided: bool = False,
) -> Tensor:
    """Sweep every lane once; layout, formulas and range are those of this module's docstring.

    Differentiable once in every tensor. Runs on the backend that `bkcore.kernels` chooses.

    Returns:
        (B, N, C, H), in v's order in memory; C = 2, or 4 with a source. float32 if v is bfloat16.

    Raises:
        ShapeError, DTypeError, InputError: the tensors do not fit together.
        BackendError: a forced backend is absent or cannot take the tensors, or somebody asks for
            a second derivative.
    """
    parts: Tensor = torch.ops.bkcore.sweep.default(v, source, energy, eta, hopping, two_sided)
    return parts


def check_sweep(
    v: Tensor,
    source: Tensor | None,
    energy: Tensor,
    eta: Tensor,
    hopping: Tensor,
    two_sided: bool,
) -> None:
    """Raise if the tensors of a sweep do not fit together."""
    if v.dtype not in _FLOATS:
        raise DTypeError(f"v must be float32, float64 or bfloat16, got {v.dtype}")
    if v.ndim != 3 or v.shape[1] < 1:
        raise ShapeError(f"v must be (B, N, H) with N >= 1, got {tuple(v.shape)}")
    check_source(two_sided, source)

    def why() -> str:
        return f"for v of {v.dtype} and shape {tuple(v.shape)}"

    check_chain(energy, eta, hopping, v.shape[1:], computed_dtype(v), v.device, why)
    check_tensors({"v": (v, v.shape, v.dtype), "source": (source, v.shape, v.dtype)}, v.device, why)


def check_source(two_sided: bool, source: Tensor | None) -> None:
    """Raise if a two-sided sweep is given a source."""
    if two_sided and source is not None:
        raise InputError("two_sided=True takes no source: only the causal sweep propagates one")


def check_chain(
    energy: Tensor,
    eta: Tensor,
    hopping: Tensor,
    size: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    why: Callable[[], str],
) -> None:
    """Raise if these are no parameters (H,), (R, H), (R, H) of chains of size (N, H)."""
    sites, lanes = size
    for name, x, rows in (("eta", eta, sites), ("hopping", hopping, max(sites - 1, 1))):
        if x.ndim != 2 or x.shape[1] != lanes or x.shape[0] not in (1, rows):
            raise ShapeError(
                f"{name} must be (1, {lanes}) or ({rows}, {lanes}) {why()}, got {tuple(x.shape)}"
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


def _check_backward(
    grad: Tensor,
    parts: Tensor,
    v: Tensor | None,
    source: Tensor | None,
    energy: Tensor,
    eta: Tensor,
    hopping: Tensor,
    two_sided: bool,
) -> None:
    check_source(two_sided, source)
    if two_sided and v is None:
        raise InputError("the adjoint of the two-sided sweep needs v, which is None")
    if parts.dtype not in _FLOATS[:2]:
        raise DTypeError(f"parts must be float32 or float64, got {parts.dtype}")
    components = 2 if source is None else 4
    if parts.ndim != 4 or parts.shape[1] < 1 or parts.shape[2] != components:
        raise ShapeError(
            f"parts must be (B, N, {components}, H) with N >= 1, got {tuple(parts.shape)}"
        )
    batch, sites, _, lanes = parts.shape

    def why() -> str:
        return f"for parts of {parts.dtype} and shape {tuple(parts.shape)}"

    check_chain(energy, eta, hopping, (sites, lanes), parts.dtype, parts.device, why)
    expected: dict[str, Expected] = {
        "parts": (parts, parts.shape, parts.dtype),
        "grad": (grad, parts.shape, parts.dtype),
    }
    for name, x in (("v", v), ("source", source)):
        if x is not None:
            half = x.dtype == torch.bfloat16 and parts.dtype == torch.float32
            dtype = x.dtype if half else parts.dtype
            expected[name] = (x, (batch, sites, lanes), dtype)
    check_tensors(expected, parts.device, why)


def _sweep(
    v: Tensor,
    source: Tensor | None,
    energy: Tensor,
    eta: Tensor,
    hopping: Tensor,
    two_sided: bool,
) -> Tensor:
    check_sweep(v, source, energy, eta, hopping, two_sided)
    backend = select(v)
    v, source = dense(_readable(backend, v)), _readable(backend, source)
    return backend.sweep(
        v,
        None if source is None else _ordered_like(v, source),
        energy,
        parameter_rows(eta),
        parameter_rows(hopping),
        two_sided,
    )


def _sweep_backward(
    grad: Tensor,
    parts: Tensor,
    v: Tensor | None,
    source: Tensor | None,
    energy: Tensor,
    eta: Tensor,
    hopping: Tensor,
    two_sided: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    _check_backward(grad, parts, v, source, energy, eta, hopping, two_sided)
    backend = select(parts)
    v, source = _readable(backend, v), _readable(backend, source)
    dv, dsource, denergy, deta, dhopping = backend.sweep_backward(
        _laid_out(grad, parts),
        parts,
        None if v is None else dense(v),
        None if source is None else _ordered_like(parts, source),
        energy,
        parameter_rows(eta),
        parameter_rows(hopping),
        two_sided,
    )
    return dv, parts.new_empty(0) if dsource is None else dsource, denergy, deta, dhopping


@overload
def _readable(backend: Backend, x: Tensor) -> Tensor: ...
@overload
def _readable(backend: Backend, x: Tensor | None) -> Tensor | None: ...
def _readable(backend: Backend, x: Tensor | None) -> Tensor | None:
    """x, widened to float32 if it is bfloat16 and the backend does not read that itself."""
    if x is None or x.dtype != torch.bfloat16 or backend.reads_bfloat16:
        return x
    return x.float()


def dense(x: Tensor) -> Tensor:
    """x itself if its lanes or its sites are contiguous in memory, else a contiguous copy."""
    return x if x.stride(2) == 1 or (sites_last(x) and x.stride(1) == 1) else x.contiguous()


def _ordered_like(x: Tensor, source: Tensor) -> Tensor:
    """source with its lanes contiguous where those of x are."""
    return source.contiguous() if x.stride(-1) == 1 and source.stride(-1) != 1 else source


def parameter_rows(x: Tensor) -> Tensor:
    """A row that all sites share is made contiguous; rows of sites that are all one are copied,
    so that a stride of 0 always means shared."""
    return x.contiguous() if x.shape[0] == 1 or x.stride(0) == 0 else x


def _laid_out(x: Tensor, like: Tensor) -> Tensor:
    """x in the memory layout of `like`."""
    return x if x.stride() == like.stride() else torch.empty_like(like).copy_(x)


def _sweep_fake(
    v: Tensor,
    source: Tensor | None,
    energy: Tensor,
    eta: Tensor,
    hopping: Tensor,
    two_sided: bool,
) -> Tensor:
    check_sweep(v, source, energy, eta, hopping, two_sided)
    return empty_parts(dense(v), 2 if source is None else 4)


def _sweep_backward_fake(
    grad: Tensor,
    parts: Tensor,
    v: Tensor | None,
    source: Tensor | None,
    energy: Tensor,
    eta: Tensor,
    hopping: Tensor,
    two_sided: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    _check_backward(grad, parts, v, source, energy, eta, hopping, two_sided)
    dv = empty_like_sites(parts)
    dsource = parts.new_empty(0) if source is None else torch.empty_like(dv)
    denergy, deta, dhopping = (parts.new_empty(x.shape) for x in (energy, eta, hopping))
    return dv, dsource, denergy, deta, dhopping


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    v, source, energy, eta, hopping, two_sided = inputs
    ctx.save_for_backward(output, v if two_sided else None, source, energy, eta, hopping)
    ctx.two_sided, ctx.dtype = two_sided, v.dtype
    keep_choice(ctx)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    parts, v, source, energy, eta, hopping = ctx.saved_tensors
    with kept_choice(ctx):
        dv, dsource, *parameters = torch.ops.bkcore.sweep_backward.default(
            grad, parts, v, source, energy, eta, hopping, ctx.two_sided
        )
    dsource = None if source is None else dsource.to(ctx.dtype)
    return dv.to(ctx.dtype), dsource, *parameters, None


def no_second_derivative(ctx: Any, *grads: Tensor) -> NoReturn:
    raise BackendError(
        "the operators of bkcore can be differentiated once only; a second derivative was asked "
        "for (create_graph=True, a gradient penalty or a Hessian), and it is not implemented"
    )


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
    """The arguments with what is mapped among their lanes: lanes are independent of each other, and
    every parameter has a value for each."""
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


library.impl("sweep", _sweep, "CompositeExplicitAutograd")
library.impl("sweep_backward", _sweep_backward, "CompositeExplicitAutograd")
torch.library.register_fake("bkcore::sweep", _sweep_fake, lib=library)
torch.library.register_fake("bkcore::sweep_backward", _sweep_backward_fake, lib=library)
torch.library.register_autograd(
    "bkcore::sweep", _backward, setup_context=_setup_context, lib=library
)
torch.library.register_autograd("bkcore::sweep_backward", no_second_derivative, lib=library)
torch.library.register_vmap("bkcore::sweep", _vmap, lib=library)
torch.library.register_vmap("bkcore::sweep_backward", _vmap_backward, lib=library)
