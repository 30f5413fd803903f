"""Resolvents of tridiagonal Hamiltonians as differentiable, linear-time functions and modules."""

from bkcore.core.attention import resolvent_attention
from bkcore.core.module import BirmanSchwingerCore
from bkcore.core.operator import BirmanSchwingerOperator, resolvent_apply, spectral_shift
from bkcore.core.resolvent import causal_sweep, causal_sweep_parts, resolvent_diagonal
from bkcore.kernels import ChannelRounding, has_recall_step, recall_step

__all__ = [
    "BirmanSchwingerCore",
    "BirmanSchwingerOperator",
    "ChannelRounding",
    "causal_sweep",
    "causal_sweep_parts",
    "has_recall_step",
    "recall_step",
    "resolvent_apply",
    "resolvent_attention",
    "resolvent_diagonal",
    "spectral_shift",
]
