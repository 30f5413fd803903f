"""Arithmetic with complex numbers of which only upper bounds are known."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Moduli:
    """Upper bounds on |x|, |Re x| and |Im x| of complex numbers x, as real tensors of equal shape.

    Products use `|Re ab| <= |Re a||Re b| + |Im a||Im b|` and the like. Where phases turn, that
    alone may grow by sqrt(2) per factor, so the parts are cut at the modulus.
    """

    modulus: Tensor
    real: Tensor
    imag: Tensor

    @staticmethod
    def of(x: Tensor) -> Moduli:
        """The moduli of known complex numbers."""
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
        """Bounds on x times a non-negative real factor."""
        return Moduli(*(part * factor for part in self.parts()))

    def widened(self, by: Tensor) -> Moduli:
        """Bounds on x plus anything of modulus at most `by`."""
        return Moduli(*(part + by for part in self.parts()))

    def at_most(self, modulus: Tensor | float) -> Moduli:
        """Bounds on x if |x| is known to be at most `modulus`."""
        cut = self.modulus.clamp(max=modulus)
        return Moduli(cut, torch.minimum(self.real, cut), torch.minimum(self.imag, cut))

    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """The three bounds: modulus, real, imag."""
        return self.modulus, self.real, self.imag
