"""The reference: every operator in plain PyTorch, on any device, to read and to compare with."""

from bkcore.kernels.backends.interface import Backend
from bkcore.kernels.backends.reference import attention, codes, float_functions, sweep

BACKEND = Backend(
    name="reference",
    absent=lambda: None,
    refuses=lambda v: None,
    describe=lambda: (None, None),
    sweep=sweep.sweep,
    sweep_backward=sweep.sweep_backward,
    sweep_codes=codes.sweep_codes,
    sweep_rounded=codes.sweep_rounded,
    sweep_step=sweep.sweep_step,
    attention=attention.attention,
    attention_backward=attention.attention_backward,
    product=codes.product,
    silu=float_functions.silu,
    rms_norm=float_functions.rms_norm,
    unit_length=float_functions.unit_length,
    short_convolution=float_functions.short_convolution,
    dense_product=float_functions.dense_product,
    softmax=float_functions.softmax,
    round_channels=codes.round_channels,
    round_channels_backward=codes.round_channels_backward,
    round_rows=codes.round_rows,
    round_weight=codes.round_weight,
    round_weight_backward=codes.round_weight_backward,
)
