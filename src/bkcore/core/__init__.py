"""Resolvents of tridiagonal Hamiltonians as differentiable, linear-time functions and modules."""

from bkcore.core.module import BirmanSchwingerCore
from bkcore.core.resolvent import causal_sweep, causal_sweep_parts, resolvent_diagonal

__all__ = ["BirmanSchwingerCore", "causal_sweep", "causal_sweep_parts", "resolvent_diagonal"]
