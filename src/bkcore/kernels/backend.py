"""What a kernel backend has to offer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

Gradients = tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor]
"""Gradients of (v, source, energy, eta, hopping); None stands for a source that was not given."""


class SweepFunction(Protocol):
    """The forward sweep on checked, contiguous tensors; see `bkcore.kernels.ops` for the layout."""

    def __call__(
        self,
        v: Tensor,
        source: Tensor | None,
        energy: Tensor,
        eta: Tensor,
        hopping: Tensor,
        two_sided: bool,
    ) -> Tensor: ...


class SweepBackwardFunction(Protocol):
    """The adjoint of the sweep on checked, contiguous tensors; v is given only if two-sided."""

    def __call__(
        self,
        grad: Tensor,
        parts: Tensor,
        v: Tensor | None,
        source: Tensor | None,
        energy: Tensor,
        eta: Tensor,
        hopping: Tensor,
        two_sided: bool,
    ) -> Gradients: ...


@dataclass(frozen=True)
class Backend:
    """One implementation of the sweep.

    `absent()` says why the backend cannot be used here at all, with a remedy, or returns None.
    `refuses(v)` says why it cannot take tensors of v's device and dtype, or returns None.
    `describe()` returns (instruction set, threads), where they mean anything.
    """

    name: str
    absent: Callable[[], str | None]
    refuses: Callable[[Tensor], str | None]
    describe: Callable[[], tuple[str | None, int | None]]
    sweep: SweepFunction
    sweep_backward: SweepBackwardFunction


def ordered_sum(terms: Tensor) -> Tensor:
    """Sum over dimension 0 by halving, in an order that depends on the length alone.

    `Tensor.sum` may split the work differently for another number of threads; this cannot.
    """
    while terms.shape[0] > 1:
        half = terms.shape[0] // 2
        folded = terms[:half] + terms[half : 2 * half]
        if terms.shape[0] % 2:
            folded[0] += terms[-1]
        terms = folded
    return terms[0] if terms.shape[0] else terms.new_zeros(terms.shape[1:])
