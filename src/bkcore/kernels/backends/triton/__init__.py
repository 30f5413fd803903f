"""The GPU backend: Triton kernels, compiled when first used."""

from bkcore.kernels.backends.interface import Backend
from bkcore.kernels.backends.reference import codes as reference
from bkcore.kernels.backends.triton import attention, codes, float_functions, launch, sweep

BACKEND = Backend(
    name="triton",
    absent=launch.absent,
    refuses=launch.refuses,
    describe=lambda: (None, None),
    sweep=sweep.sweep,
    sweep_backward=sweep.sweep_backward,
    sweep_codes=sweep.sweep_codes,
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
    round_channels=reference.round_channels,
    round_channels_backward=reference.round_channels_backward,
    round_rows=reference.round_rows,
    round_weight=reference.round_weight,
    round_weight_backward=reference.round_weight_backward,
    reads_bfloat16=True,
)
