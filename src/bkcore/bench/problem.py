"""Data to time the sweep on, and the float64 truth that its results must match first.

Lanes are independent, so a large array repeats a few different channels, and the truth of these few
is the truth of every element. Their number is odd if there is a choice, so that a kernel that mixes
up blocks of lanes does not find equal numbers there.

The truth comes from the plain PyTorch sweep, which the tests compare with dense inverses. It is
slow along a chain, so long chains are cut into windows. Each window is extended by `_HALO` sites on
both sides: with eta >= 0.5, the influence of a site falls by a factor below exp(-0.24) per site,
and beyond the halo it is below float64's resolution.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bkcore.core.resolvent import causal_sweep_parts
from bkcore.errors import BenchmarkError
from bkcore.kernels import sweep, use_backend

FORMS = ("g", "g+psi", "two-sided")

# Largest error allowed, relative to the largest value. Rounding causes up to 2e-7 in results and
# 5e-6 in gradients (the energy's is a sum over a million sites). Other processors get some room.
_TOLERANCE = 5e-6
_GRADIENT_TOLERANCE = 1e-4
_DISTINCT = 2**21  # about the most elements of v that differ
_WINDOW = 1024
_HALO = 160
_WALL = 1e15  # a potential so high that neighbours do not see past it


@dataclass(frozen=True)
class Problem:
    """Arguments of a sweep; energy, eta, hopping are (H,), v and the source (B, N, H).

    Channel h is the same as channel h + `period`.
    """

    form: str
    v: Tensor
    source: Tensor | None
    energy: Tensor
    eta: Tensor
    hopping: Tensor
    period: int

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.v.shape)

    @property
    def elements(self) -> int:
        return self.v.numel()

    @property
    def compulsory_bytes(self) -> int:
        """Bytes that must move: every input read once, every output written once."""
        return self.elements * self.v.element_size() * (6 if self.source is not None else 3)

    def run(self) -> Tensor:
        """The parts, (B, N, C, H), through the functions that users call."""
        if self.form == "two-sided":
            eta, hopping = self.eta.unsqueeze(0), self.hopping.unsqueeze(0)
            return sweep(self.v, None, self.energy, eta, hopping, two_sided=True)
        return causal_sweep_parts(
            self.v,
            self.source,
            energy=self.energy,
            eta=self.eta,
            hopping=self.hopping,
            onsite=0.0,
        )

    def inputs(self) -> list[Tensor]:
        """The tensors that have a gradient: v, the source if there is one, energy, eta, hopping."""
        tensors = (self.v, self.source, self.energy, self.eta, self.hopping)
        return [tensor for tensor in tensors if tensor is not None]

    def with_gradients(self) -> Problem:
        """The same problem on leaves that require gradients."""
        return self._map(lambda tensor: tensor.detach().requires_grad_())

    def to(self, device: str) -> Problem:
        """The same problem on a device."""
        return self._map(lambda tensor: tensor.to(device))

    def distinct(self) -> Problem:
        """One period of the channels, in float64."""
        return self._map(lambda tensor: tensor[..., : self.period].double())

    def _map(self, change: Callable[[Tensor], Tensor]) -> Problem:
        return replace(
            self,
            v=change(self.v),
            source=None if self.source is None else change(self.source),
            energy=change(self.energy),
            eta=change(self.eta),
            hopping=change(self.hopping),
        )


def random_problem(form: str, shape: tuple[int, int, int], seed: int = 0) -> Problem:
    """Normal potentials and sources, energies in the band, 0.5 <= eta <= 1, hopping 1, float32."""
    batch, sites, lanes = shape
    period = min(lanes, max(3, _DISTINCT // (batch * sites)) | 1)
    generator = torch.Generator().manual_seed(seed)

    def normal() -> Tensor:
        return repeat_channels(torch.randn(batch, sites, period, generator=generator), lanes)

    return Problem(
        form,
        normal(),
        normal() if form == "g+psi" else None,
        repeat_channels(torch.linspace(-1, 1, period), lanes),
        repeat_channels(torch.linspace(0.5, 1, period), lanes),
        torch.ones(lanes),
        period,
    )


def repeat_channels(tensor: Tensor, lanes: int) -> Tensor:
    """Repeat the last dimension up to `lanes`; contiguous."""
    repeats = -(-lanes // tensor.shape[-1])
    return torch.cat([tensor] * repeats, dim=-1)[..., :lanes].contiguous()


def true_parts(problem: Problem) -> Tensor:
    """The parts of the distinct channels, float64 (B, N, C, period)."""
    with use_backend("reference"):
        return _windowed_parts(problem.distinct())


def true_gradients(problem: Problem, cotangent: Tensor) -> Sequence[Tensor]:
    """Gradients of `problem.inputs()` for the distinct channels, float64.

    The cotangent has the shape of the parts, and the period of the problem.
    """
    distinct = problem.distinct().with_gradients()
    with use_backend("reference"):
        parts = _windowed_parts(distinct)
        weights = cotangent[..., : problem.period].double()
        return torch.autograd.grad(parts, distinct.inputs(), weights)


def check_parts(problem: Problem, parts: Tensor, truth: Tensor) -> None:
    """Compare every element of a result with the truth.

    Raises:
        BenchmarkError: if an element is off by more than rounding can explain.
    """
    _check(f"{problem.form} of shape {problem.shape}", parts, truth, _TOLERANCE)


def check_gradients(problem: Problem, gradients: Sequence[Tensor], truth: Sequence[Tensor]) -> None:
    """Compare every element of the gradients with the truth.

    Raises:
        BenchmarkError: as in `check_parts`.
    """
    for number, (found, true) in enumerate(zip(gradients, truth, strict=True)):
        name = f"gradient {number} of {problem.form} of shape {problem.shape}"
        _check(name, found, true, _GRADIENT_TOLERANCE)


def _check(name: str, found: Tensor, truth: Tensor, tolerance: float) -> None:
    period, scale = truth.shape[-1], truth.abs().max().item()
    truth = truth.to(found.dtype)
    for start in range(0, found.shape[-1], period):
        block = found[..., start : start + period]
        error = (block - truth[..., : block.shape[-1]]).abs().max().item()
        if not error <= tolerance * scale:
            raise BenchmarkError(
                f"wrong result, so nothing was timed: {name} is off by {error:.2g} where values "
                f"reach {scale:.2g}; at most {tolerance:.0e} of that is rounding"
            )


def _windowed_parts(problem: Problem) -> Tensor:
    batch, sites, lanes = problem.shape
    if sites <= 2 * _WINDOW:
        return _sweep(problem, problem.v, problem.source, 1)
    v = _windows(problem.v, _WALL)
    source = None if problem.source is None else _windows(problem.source, 0.0)
    parts = _sweep(problem, v, source, batch)[:, _HALO : _HALO + _WINDOW]
    count, _, kinds, _ = parts.shape
    parts = parts.reshape(count, _WINDOW, kinds, batch, lanes).permute(3, 0, 1, 2, 4)
    return parts.reshape(batch, count * _WINDOW, kinds, lanes)[:, :sites]


def _windows(tensor: Tensor, fill: float) -> Tensor:
    """(B, N, H) as overlapping windows (W, sites, B * H)."""
    batch, sites, lanes = tensor.shape
    left = tensor.new_full((batch, _HALO, lanes), fill)
    right = tensor.new_full((batch, _HALO + -sites % _WINDOW, lanes), fill)
    padded = torch.cat((left, tensor, right), 1)
    size = _WINDOW + 2 * _HALO
    windows = padded.unfold(1, size, _WINDOW)
    return windows.permute(1, 3, 0, 2).reshape(-1, size, batch * lanes)


def _sweep(problem: Problem, v: Tensor, source: Tensor | None, copies: int) -> Tensor:
    energy = problem.energy.repeat(copies)
    eta, hopping = problem.eta.repeat(1, copies), problem.hopping.repeat(1, copies)
    return sweep(v, source, energy, eta, hopping, two_sided=problem.form == "two-sided")
