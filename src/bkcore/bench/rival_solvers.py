"""Other ways to compute the diagonal of the resolvent, against bkcore."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch._higher_order_ops.associative_scan import associative_scan

from bkcore.bench.problem import Problem, check_parts, true_parts
from bkcore.bench.result import Result
from bkcore.bench.timing import interleaved
from bkcore.core.resolvent import resolvent_diagonal_parts
from bkcore.host import torch_threads

BATCH = 16
SITES = (128, 512, 2048, 8192, 32768, 65536)
SCAN_SITES = (512, 8192)  # each length is compiled separately, which takes most of a minute
MOST_SECONDS = 2.0  # a call that would take longer is left out
_ONSITE, _Z = -2.0, 1j

Complex = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Rival:
    """Another way to compute the two-sided diagonal.

    Attributes:
        name: its usual name.
        diagonal: from real potentials (B, N) to the complex diagonal of (H - 1j)^-1, (B, N).
        order: its time grows with this power of N.
        sites: the lengths at which it is timed.
    """

    name: str
    diagonal: Callable[[Tensor], Tensor]
    order: int
    sites: tuple[int, ...]


def comparison(counts: Sequence[int]) -> Iterator[Result]:
    """bkcore, against each rival at growing N, with as many threads as there are."""
    with torch_threads(counts[-1]), torch.no_grad():
        for rival in rivals():
            yield from _compare(rival, counts[-1])


def rivals() -> list[Rival]:
    """The rivals that can run here."""
    found = [
        Rival("eager loop", eager_loop, 1, SITES),
        Rival("dense inverse", dense_inverse, 3, SITES),
        Rival("compiled scan", _compiled_scan(), 1, SCAN_SITES),
        Rival("banded solver", banded_solve, 2, SITES),
    ]
    missing = missing_rivals()
    return [rival for rival in found if rival.name not in missing]


def missing_rivals() -> dict[str, str]:
    """Rivals that cannot run here, and why."""
    missing = {}
    if not any(map(shutil.which, filter(None, (os.environ.get("CXX"), "g++", "clang++")))):
        missing["compiled scan"] = "which needs a C++ compiler"
    if importlib.util.find_spec("scipy") is None:
        missing["banded solver"] = "which needs scipy: pip install scipy"
    return missing


def _compare(rival: Rival, count: int) -> Iterator[Result]:
    seconds, before = 0.0, 1
    for sites in rival.sites:
        if seconds * (sites / before) ** rival.order > MOST_SECONDS:
            return
        problem = _problem(sites)
        v, truth = problem.v.squeeze(2), true_parts(problem)
        check_parts(problem, _ours(v).unsqueeze(3), truth)
        check_parts(problem, torch.view_as_real(rival.diagonal(v)).unsqueeze(3), truth)
        ours, seconds = interleaved(partial(_ours, v), partial(rival.diagonal, v))
        yield Result("comparison", (BATCH, sites), count, ours, seconds, rival.name)
        before = sites


def _problem(sites: int) -> Problem:
    v = torch.randn(BATCH, sites, 1, generator=torch.Generator().manual_seed(0))
    energy, eta = torch.tensor([_Z.real - _ONSITE]), torch.tensor([_Z.imag])
    return Problem("two-sided", v, None, energy, eta, torch.ones(1), 1)


def _ours(v: Tensor) -> Tensor:
    return resolvent_diagonal_parts(v, _Z, onsite=_ONSITE)


def dense_inverse(v: Tensor) -> Tensor:
    """The diagonal of the full inverse, computed one chain at a time.

    With PyTorch 2.13, MKL 2024.2 and two threads, inverting a batch of matrices of 256 or more rows
    gives wrong results, without a warning or with an error about pivots.
    """
    bonds = torch.ones(v.shape[1] - 1)
    off_diagonal = torch.diag(bonds, 1) + torch.diag(bonds, -1)
    matrices = (torch.diag(chain) + off_diagonal for chain in v + (_ONSITE - _Z))
    return torch.stack([torch.linalg.inv(matrix).diagonal() for matrix in matrices])


def eager_loop(v: Tensor) -> Tensor:
    """The continued fractions from both ends, one site at a time."""
    diagonal = (v + (_ONSITE - _Z)).unbind(1)
    left = _denominators(diagonal)
    right = _denominators(diagonal[::-1])[::-1]
    # d_i = a_i - g_{i-1} and d'_i = a_i - r_{i+1}, so that 1/G_i = d_i + d'_i - a_i.
    return 1 / (torch.stack(left, 1) + torch.stack(right, 1) - torch.stack(diagonal, 1))


def _denominators(diagonal: Sequence[Tensor]) -> list[Tensor]:
    found = [diagonal[0]]
    for site in diagonal[1:]:
        found.append(site - 1 / found[-1])
    return found


def banded_solve(v: Tensor) -> Tensor:
    """LAPACK's tridiagonal solver on the columns of the identity, one chain at a time."""
    from scipy.linalg import solve_banded

    batch, sites = v.shape
    identity = torch.eye(sites).numpy()
    bands = torch.ones(batch, 3, sites, dtype=torch.complex64)
    bands[:, 1] = v + (_ONSITE - _Z)
    inverses = (solve_banded((1, 1), chain, identity) for chain in bands.numpy())
    return torch.stack([torch.from_numpy(inverse).diagonal() for inverse in inverses])


def _compiled_scan() -> Callable[[Tensor], Tensor]:
    compiled = torch.compile(scan_from_both_ends, dynamic=False)

    def diagonal(v: Tensor) -> Tensor:
        return torch.complex(*compiled(v))

    return diagonal


def scan_from_both_ends(v: Tensor) -> Complex:
    """Products of the matrices [[0, 1], [-1, a_i]] by a parallel scan, from both ends at once.

    Re and Im are separate tensors: inductor has no complex kernels.
    """
    a = torch.cat((v, v.flip(1))) + (_ONSITE - _Z.real)
    zero, one = torch.zeros_like(a), torch.ones_like(a)
    matrices = (zero, zero, one, zero, -one, zero, a, -_Z.imag * one)
    product = associative_scan(_multiply, matrices, dim=1, combine_mode="generic")
    # g = b/d of the product [[a, b], [c, d]]; 1/G_i = 1/g_i + 1/r_i - a_i.
    inverse_real, inverse_imag = _divide((product[6], product[7]), (product[2], product[3]))
    left, right = inverse_real.split(v.shape[0])
    real = left + right.flip(1) - a[: v.shape[0]]
    left, right = inverse_imag.split(v.shape[0])
    imag = left + right.flip(1) + _Z.imag
    size = real * real + imag * imag
    return real / size, -imag / size


def _multiply(first: Sequence[Tensor], then: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """`then` @ `first`, complex 2x2 as eight real tensors, divided by the largest entry."""
    a, b, c, d = _pairs(first)
    e, f, g, h = _pairs(then)
    entries = (*_dot(e, a, f, c), *_dot(e, b, f, d), *_dot(g, a, h, c), *_dot(g, b, h, d))
    size = entries[0].abs()
    for entry in entries[1:]:
        size = torch.maximum(size, entry.abs())
    inverse = 1 / size
    return tuple(entry * inverse for entry in entries)


def _pairs(matrix: Sequence[Tensor]) -> list[Complex]:
    return [(matrix[i], matrix[i + 1]) for i in (0, 2, 4, 6)]


def _dot(x: Complex, y: Complex, z: Complex, w: Complex) -> Complex:
    real = x[0] * y[0] - x[1] * y[1] + z[0] * w[0] - z[1] * w[1]
    return real, x[0] * y[1] + x[1] * y[0] + z[0] * w[1] + z[1] * w[0]


def _divide(x: Complex, y: Complex) -> Complex:
    size = y[0] * y[0] + y[1] * y[1]
    real, imag = x[0] * y[0] + x[1] * y[1], x[1] * y[0] - x[0] * y[1]
    return real / size, imag / size
