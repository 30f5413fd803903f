"""Sums and products of complex numbers of which only upper bounds are known."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Moduli:
    """Upper bounds on |x|, |Re x| and |Im x| of complex numbers x, real tensors of one shape.

    Products follow `|Re ab| <= |Re a||Re b| + |Im a||Im b|` and its like. That alone may grow by
    sqrt(2) a factor where phases turn, hence the cut to the modulus.
    """

    modulus: Tensor
    real: Tensor
    imag: Tensor

    @staticmethod
    def of(x: Tensor) -> Moduli:
        """Of complex numbers that are known."""
        return Moduli(x.abs(), x.real.abs(), x.imag.abs())

    def __add__(self, other: Moduli) -> Moduli:
        return Moduli(
            self.modulus + other.modulus, self.real + other.real, self.imag + other.imag
        ).at_most(torch.inf)

    def __mul__(self, other: Moduli) -> Moduli:
        return Moduli(
            self.modulus * other.modulus,
            self.real * other.real + self.imag * other.imag,
            self.real * other.imag + self.imag * other.real,
        ).at_most(torch.inf)

    def times(self, factor: Tensor) -> Moduli:
        """Of x times a real factor that is not negative."""
        return Moduli(*(part * factor for part in self.parts()))

    def widened(self, by: Tensor) -> Moduli:
        """Of x plus anything of modulus `by`."""
        return Moduli(*(part + by for part in self.parts()))

    def at_most(self, modulus: Tensor | float) -> Moduli:
        """Of x if |x| is known not to exceed `modulus`."""
        cut = self.modulus.clamp(max=modulus)
        return Moduli(cut, torch.minimum(self.real, cut), torch.minimum(self.imag, cut))

    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """The three bounds: modulus, real, imag."""
        return self.modulus, self.real, self.imag
