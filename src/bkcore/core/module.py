"""The resolvent diagonal as a module."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor, nn

from bkcore.core.arguments import (
    computing_dtype,
    real_number,
    require_bool,
    require_range,
    require_real_float,
)
from bkcore.core.resolvent import resolvent_diagonal_parts
from bkcore.errors import InputError, ShapeError


class BirmanSchwingerCore(nn.Module):
    """Maps a potential to the diagonal of the resolvent G(z) = (H0 + diag(v) - z)^-1, in O(N).

    It has no parameters. For learned or per-site energies and hoppings, use `resolvent_diagonal`.

    Args:
        n_seq: number of sites, 1 <= n_seq < 2^31.
        epsilon: Im z, > 0. This and the numbers below may be Python's, NumPy's or tensors with one
            element. They must be in the range of `bkcore.core.resolvent`: for float64 when the
            module is built, and for the dtype of v in the forward pass.
        energy: Re z.
        hopping: off-diagonal entry of H0.
        onsite: diagonal entry of H0.
        causal: use the left-connected Green's function, in which site i sees only sites 0 ... i.

    Raises:
        InputError: if n_seq or epsilon is not valid, or a number is out of range.
        DTypeError: if a number is not a real number, or causal is not a bool.
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
        if isinstance(n_seq, bool) or not isinstance(n_seq, int) or not 1 <= n_seq < 2**31:
            raise InputError(f"n_seq must be an integer of at least 1, below 2^31, not {n_seq!r}")
        require_bool("causal", causal)
        self.n_seq = n_seq
        self.epsilon = real_number("epsilon", epsilon)
        self.energy = real_number("energy", energy)
        self.hopping = real_number("hopping", hopping)
        self.onsite = real_number("onsite", onsite)
        self.causal = causal
        if not self.epsilon > 0:
            raise InputError(f"epsilon must be > 0, not {epsilon}; it is the imaginary part of z")
        self._require_range(torch.float64)

    def forward(self, v: Tensor) -> Tensor:
        """Features of a potential.

        Args:
            v: real (..., n_seq).

        Returns:
            real (..., n_seq, 2), [Re G_ii, Im G_ii]: float32, or float64 for float64 v.

        Raises:
            ShapeError: the last dimension of v is not n_seq.
            DTypeError: v is complex or an integer tensor.
            InputError: v or a number of the core is out of range for the dtype of v.
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
        """Check potentials as `forward` does, except for their values; and the core's numbers."""
        require_real_float("v", v)
        if v.ndim < 1 or v.shape[-1] != self.n_seq:
            raise ShapeError(
                f"v must be (..., {self.n_seq}), not {tuple(v.shape)}; pad or cut the sequence, "
                "or build the core with another n_seq"
            )
        self._require_range(computing_dtype(v))

    def _require_range(self, dtype: torch.dtype) -> None:
        _require_range(dtype, self.energy, self.onsite, self.epsilon, self.hopping)

    def extra_repr(self) -> str:
        return (
            f"n_seq={self.n_seq}, epsilon={self.epsilon}, energy={self.energy}, "
            f"hopping={self.hopping}, onsite={self.onsite}, causal={self.causal}"
        )


@lru_cache
def _require_range(
    dtype: torch.dtype, energy: float, onsite: float, epsilon: float, hopping: float
) -> None:
    """Check the numbers of a core once, not at every call."""
    added = {"energy": energy, "onsite": onsite}
    require_range(dtype, added, epsilon, hopping, eta_name="epsilon")
