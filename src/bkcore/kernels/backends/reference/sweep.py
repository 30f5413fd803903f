"""The sweep in plain PyTorch: any device, float32 and float64, one Python step per site.

It is the readable definition that the native kernels are compared with, and it is slow. The
formulas and their derivation are in `bkcore.kernels.ops.sweep`. Complex tensors are used only here,
inside.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bkcore.kernels.backends.interface import (
    Sweep,
    SweepBackward,
    SweepGradients,
    SweepStep,
    ordered_sum,
)
from bkcore.kernels.layout import empty_like_sites, empty_parts


def sweep(args: Sweep) -> Tensor:
    v = args.v
    diagonal = torch.complex(v - args.energy, (-args.eta).expand_as(v))
    t = _bonds(args.hopping, v.shape[1])
    left = _left_connected(diagonal, t)
    if args.two_sided:
        values = [_two_sided(diagonal, t, left, _right_connected(diagonal, t))]
    elif args.source is None:
        values = [left]
    else:
        values = [left, _propagate(left, args.source, t)]
    components = [x for value in values for x in (value.real, value.imag)]
    return empty_parts(v, len(components)).copy_(torch.stack(components, 2))


def sweep_backward(args: SweepBackward) -> SweepGradients:
    parts, v = args.parts, args.v
    t = _bonds(args.hopping, parts.shape[1])
    dsource: Tensor | None = None
    if args.two_sided:
        assert v is not None
        diagonal = torch.complex(v - args.energy, (-args.eta).expand_as(v))
        site, bond = _two_sided_adjoint(diagonal, t, _join(parts, 0), _cotangent(args.grad, 0))
    else:
        site, bond, dsource = _causal_adjoint(parts, args.grad, args.source, t)
    return SweepGradients(
        empty_like_sites(parts).copy_(-site.real),
        None if dsource is None else empty_like_sites(parts).copy_(dsource),
        ordered_sum(site.real.flatten(0, 1)),
        _fold(-site.imag, args.eta.shape[0]),
        _fold(bond, args.hopping.shape[0]),
    )


def sweep_step(args: SweepStep) -> None:
    state, v, hopping = args.state, args.v, args.hopping
    before = torch.complex(state[:, 0], state[:, 1])
    diagonal = torch.complex(v - args.energy, (-args.eta).expand_as(v))
    g = 1 / (diagonal - hopping.square() * before)
    values = [g.real, g.imag]
    if args.source is not None:
        psi = g * (args.source + hopping * torch.complex(state[:, 2], state[:, 3]))
        values += [psi.real, psi.imag]
    state.copy_(torch.stack(values, 1))


def _bonds(hopping: Tensor, sites: int) -> Tensor:
    """Hopping with one row per site: row i couples sites i and i + 1, and the last row is 0."""
    return torch.cat((hopping.expand(sites - 1, -1), hopping.new_zeros(1, hopping.shape[1])))


def _left_connected(diagonal: Tensor, t: Tensor) -> Tensor:
    rows = [1 / diagonal[:, 0]]
    for i in range(1, diagonal.shape[1]):
        rows.append(1 / (diagonal[:, i] - t[i - 1].square() * rows[-1]))
    return torch.stack(rows, 1)


def _right_connected(diagonal: Tensor, t: Tensor) -> Tensor:
    rows = [1 / diagonal[:, -1]]
    for i in range(diagonal.shape[1] - 2, -1, -1):
        rows.append(1 / (diagonal[:, i] - t[i].square() * rows[-1]))
    return torch.stack(rows[::-1], 1)


def _two_sided(diagonal: Tensor, t: Tensor, left: Tensor, right: Tensor) -> Tensor:
    inverse = diagonal.clone()
    inverse[:, 1:] -= t[:-1].square() * left[:, :-1]
    inverse[:, :-1] -= t[:-1].square() * right[:, 1:]
    return 1 / inverse


def _propagate(left: Tensor, source: Tensor, t: Tensor) -> Tensor:
    rows = [left[:, 0] * source[:, 0]]
    for i in range(1, left.shape[1]):
        rows.append(left[:, i] * (source[:, i] + t[i - 1] * rows[-1]))
    return torch.stack(rows, 1)


def _causal_adjoint(
    parts: Tensor, grad: Tensor, source: Tensor | None, t: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """P_i for every site, the gradient of every bond, and the gradient of the source."""
    g, c_g = _join(parts, 0), _cotangent(grad, 0)
    bond = g.real.new_zeros(g.shape[0], g.shape[1] - 1, g.shape[2])
    dsource = None
    if source is not None:
        psi, c_psi = _join(parts, 2), _cotangent(grad, 2)
        mu = _accumulate(c_psi, t * torch.ones_like(g), g)
        driven = source + _after(t * psi)
        c_g = c_g + mu * driven
        dsource = (mu * g).real
        bond = bond + ((mu * g)[:, 1:] * psi[:, :-1]).real
    site = _accumulate(c_g, t.square() * torch.ones_like(g), g.square()) * g.square()
    bond = bond + 2 * t[:-1] * (site[:, 1:] * g[:, :-1]).real
    return site, bond, dsource


def _two_sided_adjoint(
    diagonal: Tensor, t: Tensor, center: Tensor, c: Tensor
) -> tuple[Tensor, Tensor]:
    """W_j for every site and the gradient of every bond."""
    left, right = _left_connected(diagonal, t), _right_connected(diagonal, t)
    from_left, from_right = torch.zeros_like(c), torch.zeros_like(c)
    for j in range(1, c.shape[1]):
        hop = (t[j - 1] * left[:, j - 1]).square()
        from_left[:, j] = hop * (from_left[:, j - 1] + c[:, j - 1])
    for j in range(c.shape[1] - 2, -1, -1):
        hop = (t[j] * right[:, j + 1]).square()
        from_right[:, j] = hop * (from_right[:, j + 1] + c[:, j + 1])
    weight = center.square()
    towards_right = (right[:, 1:] * (weight * (c + from_left))[:, :-1]).real
    towards_left = (left[:, :-1] * (weight * (c + from_right))[:, 1:]).real
    bond = 2 * t[:-1] * (towards_right + towards_left)
    return weight * (c + from_left + from_right), bond


def _accumulate(term: Tensor, step: Tensor, factor: Tensor) -> Tensor:
    """x_i = term_i + step_i * factor_{i+1} * x_{i+1}, from the last site to the first."""
    rows = [term[:, -1]]
    for i in range(term.shape[1] - 2, -1, -1):
        rows.append(term[:, i] + step[:, i] * factor[:, i + 1] * rows[-1])
    return torch.stack(rows[::-1], 1)


def _after(x: Tensor) -> Tensor:
    """x moved one site to the right; the first site becomes 0."""
    return torch.cat((torch.zeros_like(x[:, :1]), x[:, :-1]), 1)


def _join(parts: Tensor, first: int) -> Tensor:
    return torch.complex(parts[:, :, first], parts[:, :, first + 1])


def _cotangent(grad: Tensor, first: int) -> Tensor:
    """dL/dRe - i dL/dIm, really negated in memory: a compiled graph that calls the operator
    misreads a lazily conjugated tensor."""
    return torch.complex(grad[:, :, first], -grad[:, :, first + 1])


def _fold(per_site: Tensor, rows: int) -> Tensor:
    """Sum (B, M, H) over the batch, and also over M for a parameter that all sites share."""
    if rows == per_site.shape[1]:
        return ordered_sum(per_site)
    return ordered_sum(per_site.flatten(0, 1)).unsqueeze(0)
