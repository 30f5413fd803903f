"""The resolvent diagonal as a module."""

from __future__ import annotations

from torch import Tensor, nn

from bkcore.core.resolvent import require_real_float, resolvent_diagonal_parts
from bkcore.errors import InputError, ShapeError


class BirmanSchwingerCore(nn.Module):
    """Potential in, diagonal of the resolvent G(z) = (H0 + diag(v) - z)^-1 out, in O(N).

    It has no parameters. For learned or per-site energies and hoppings use `resolvent_diagonal`.

    Args:
        n_seq: number of sites, >= 1.
        epsilon: Im z, > 0.
        energy: Re z.
        hopping: off-diagonal entry of H0.
        onsite: diagonal entry of H0.
        causal: left-connected Green's function, in which site i sees sites 0 ... i only.

    Raises:
        InputError: n_seq < 1 or epsilon <= 0.
    """

    def __init__(
        self,
        n_seq: int,
        epsilon: float = 1.0,
        *,
        energy: float = 0.0,
        hopping: float = 1.0,
        onsite: float = -2.0,
        causal: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(n_seq, int) or n_seq < 1:
            raise InputError(f"n_seq must be an integer of at least 1, got {n_seq}")
        if not epsilon > 0:
            raise InputError(f"epsilon must be > 0, got {epsilon}: it is the imaginary part of z")
        self.n_seq = n_seq
        self.epsilon = epsilon
        self.energy = energy
        self.hopping = hopping
        self.onsite = onsite
        self.causal = causal

    def forward(self, v: Tensor) -> Tensor:
        """Features of a potential.

        Args:
            v: real (..., n_seq).

        Returns:
            real (..., n_seq, 2), [Re G_ii, Im G_ii]: float32, or float64 for float64 v.

        Raises:
            ShapeError: the last dimension of v is not n_seq.
            DTypeError: v is complex or an integer tensor.
        """
        self.check(v)
        return resolvent_diagonal_parts(
            v,
            complex(self.energy, self.epsilon),
            hopping=self.hopping,
            onsite=self.onsite,
            causal=self.causal,
        )

    def check(self, v: Tensor) -> None:
        """Raise what `forward` raises for potentials that it cannot take."""
        require_real_float("v", v)
        if v.ndim < 1 or v.shape[-1] != self.n_seq:
            raise ShapeError(
                f"v must be (..., {self.n_seq}), got {tuple(v.shape)}; pad or cut the sequence, "
                "or build the core with another n_seq"
            )

    def extra_repr(self) -> str:
        return (
            f"n_seq={self.n_seq}, epsilon={self.epsilon}, energy={self.energy}, "
            f"hopping={self.hopping}, onsite={self.onsite}, causal={self.causal}"
        )
