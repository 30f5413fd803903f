"""The spectral shift, counted and smoothed, against LAPACK's eigenvalues."""

import math

import numpy as np
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy.linalg import eigvalsh_tridiagonal
from torch import Tensor

from bkcore.core.operator import BirmanSchwingerOperator, spectral_shift
from tests.core.chains import bonds, dense, potential, quick, seeds, sigmas, sizes


def counted_shift(v: Tensor, energy: float, hopping: Tensor) -> int:
    """N_H0(E) - N_H(E) from LAPACK's eigenvalues."""
    counts = []
    for diagonal in (0 * v - 2.0, v - 2.0):
        levels = diagonal.numpy()
        if len(levels) > 1:
            levels = eigvalsh_tridiagonal(levels, hopping.numpy())
        # LAPACK's levels carry an error of a few U of the norm: within it nobody knows the count.
        assume(np.abs(levels - energy).min() > 1e-12)
        counts.append(int((levels < energy).sum()))
    return counts[0] - counts[1]


@quick
@given(seeds, sizes, sigmas, st.floats(-12.0, 8.0))
def test_spectral_shift_counts_eigenvalues(seed: int, n: int, sigma: float, energy: float) -> None:
    v, t = potential(seed, n, sigma), bonds(seed, n)
    t[::3] = 0.0  # broken bonds: 0/0 in a careless continued fraction
    expected = counted_shift(v, energy, t)
    assert int(spectral_shift(v, energy, hopping=t)) == expected


@quick
@given(st.lists(st.integers(-3, 3), min_size=1, max_size=12), st.integers(-6, 4))
def test_spectral_shift_survives_zero_pivots(v: list[int], energy: int) -> None:
    # Small integers make pivots vanish exactly, at most energies.
    potential_ = torch.tensor(v, dtype=torch.float64)
    expected = counted_shift(potential_, energy, torch.ones(len(v) - 1, dtype=torch.float64))
    assert int(spectral_shift(potential_, float(energy))) == expected


def test_spectral_shift_counts_strictly_below() -> None:
    # Three free sites have levels -2 - sqrt 2, -2, -2 + sqrt 2; raised by 1, only one is below -2.
    v = torch.ones(3, dtype=torch.float64)
    assert int(spectral_shift(v, -2.0)) == 0
    assert int(spectral_shift(v, math.nextafter(-2.0, 0.0))) == 1


def test_spectral_shift_takes_many_energies_and_potentials() -> None:
    v = torch.stack([potential(s, 11, 2.0) for s in range(3)])[:, None]
    grid = torch.linspace(-8, 4, 7, dtype=torch.float64)[:, None]
    shifts = spectral_shift(v, grid)
    assert shifts.shape == (3, 7)
    assert shifts.dtype == torch.int64
    assert int(shifts[2, 4]) == int(spectral_shift(v[2, 0], float(grid[4])))


def test_smoothed_spectral_shift_beyond_one_turn() -> None:
    # Thirty strong wells take thirty levels below E: thirty half turns, not one principal argument.
    v = torch.full((30,), -20.0, dtype=torch.float64)
    smoothed = BirmanSchwingerOperator(v, -10.0 + 1e-6j).spectral_shift()
    assert smoothed.dtype == torch.float64
    # Each level at distance d >= 6 from E contributes at most eta / (pi d).
    assert abs(float(smoothed) + 30.0) <= 60 * 1e-6 / (math.pi * 6.0)


@quick
@given(seeds, sizes, sigmas, st.floats(-12.0, 8.0))
def test_smoothed_spectral_shift_tends_to_the_count(
    seed: int, n: int, sigma: float, energy: float
) -> None:
    v, t, eta = potential(seed, n, sigma), bonds(seed, n), 1e-6
    levels = np.concatenate(
        [
            np.linalg.eigvalsh(dense(v, t).numpy()),
            np.linalg.eigvalsh(dense(0 * v, t).numpy()),
        ]
    )
    assume(np.abs(levels - energy).min() > 1e-3)
    smoothed = float(BirmanSchwingerOperator(v, complex(energy, eta), hopping=t).spectral_shift())
    smear = (eta / np.abs(levels - energy)).sum() / math.pi  # atan(x) <= x, level by level
    assert abs(smoothed - int(spectral_shift(v, energy, hopping=t))) <= smear + 1e-9
