"""The O(N) sweep behind every public function, and the choice of what runs it."""

from bkcore.kernels.attention import attention
from bkcore.kernels.checks import ChannelRounding
from bkcore.kernels.codes import sweep_codes
from bkcore.kernels.ops import sweep
from bkcore.kernels.product import product
from bkcore.kernels.recall import has_recall_step, recall_step
from bkcore.kernels.round import (
    round_channels,
    round_channels_straight_through,
    round_rows,
)
from bkcore.kernels.rounded import sweep_rounded
from bkcore.kernels.selection import BackendInfo, backends, use_backend
from bkcore.kernels.stream import step
from bkcore.kernels.weight import round_weight

__all__ = [
    "BackendInfo",
    "ChannelRounding",
    "attention",
    "backends",
    "has_recall_step",
    "product",
    "recall_step",
    "round_channels",
    "round_channels_straight_through",
    "round_rows",
    "round_weight",
    "step",
    "sweep",
    "sweep_codes",
    "sweep_rounded",
    "use_backend",
]
