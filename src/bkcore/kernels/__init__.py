"""The operators behind every public function, and the choice of their backend."""

from bkcore.deprecated import moved_names
from bkcore.kernels.backends.selection import BackendInfo, describe_backends, use_backend
from bkcore.kernels.ops.attention import attention
from bkcore.kernels.ops.float_functions import (
    dense_product,
    in_order,
    rms_norm,
    short_convolution,
    silu,
    softmax,
    unit_length,
)
from bkcore.kernels.ops.product import product
from bkcore.kernels.ops.round_activations import (
    round_channels,
    round_channels_straight_through,
    round_rows,
)
from bkcore.kernels.ops.round_weight import round_weight
from bkcore.kernels.ops.sweep import sweep
from bkcore.kernels.ops.sweep_codes import sweep_codes
from bkcore.kernels.ops.sweep_rounded import sweep_rounded
from bkcore.kernels.ops.sweep_step import sweep_step

__all__ = [
    "BackendInfo",
    "attention",
    "dense_product",
    "describe_backends",
    "in_order",
    "product",
    "rms_norm",
    "round_channels",
    "round_channels_straight_through",
    "round_rows",
    "round_weight",
    "short_convolution",
    "silu",
    "softmax",
    "sweep",
    "sweep_codes",
    "sweep_rounded",
    "sweep_step",
    "unit_length",
    "use_backend",
]

__getattr__ = moved_names(__name__)
