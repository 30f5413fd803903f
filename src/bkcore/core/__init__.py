"""Resolvents of tridiagonal Hamiltonians as differentiable, linear-time functions and modules."""

from bkcore.core.attention import resolvent_attention
from bkcore.core.module import BirmanSchwingerCore
from bkcore.core.operator import BirmanSchwingerOperator, resolvent_apply, spectral_shift
from bkcore.core.resolvent import causal_sweep, causal_sweep_parts, resolvent_diagonal
from bkcore.deprecated import moved_names

__all__ = [
    "BirmanSchwingerCore",
    "BirmanSchwingerOperator",
    "causal_sweep",
    "causal_sweep_parts",
    "resolvent_apply",
    "resolvent_attention",
    "resolvent_diagonal",
    "spectral_shift",
]

__getattr__ = moved_names(__name__)
