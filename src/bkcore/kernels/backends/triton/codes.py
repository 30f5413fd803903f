"""Operators with integer codes on a GPU: the host side of `product_kernels`.

Rounding to codes is done by the reference's PyTorch code.
"""

from __future__ import annotations

from torch import Tensor

from bkcore.kernels import int4_levels
from bkcore.kernels.backends.interface import Product, SweepRounded
from bkcore.kernels.backends.reference import codes as reference
from bkcore.kernels.backends.triton.launch import kernels, on
from bkcore.kernels.backends.triton.sweep import sweep

_ROWS, _OUTPUTS, _INPUTS = 16, 64, 64
"""Tile of a product in codes."""


def sweep_rounded(args: SweepRounded) -> Tensor:
    return reference.sweep_rounded(args, sweep)


def product(args: Product) -> Tensor:
    x, weight = args.x, args.weight
    codes, row_scale = reference.quantize_rows(x.reshape(-1, x.shape[-1]))
    (rows, inputs), (outputs, groups) = codes.shape, args.scales.shape
    out = x.new_empty(rows, outputs)
    programs = -(-outputs // _OUTPUTS) * -(-rows // _ROWS)
    if programs:
        with on(x.device):
            # A term is rounded before it is added, so no fused multiply-add.
            kernels("product").product[(programs,)](
                *(codes, row_scale, weight, int4_levels.levels(x.device), args.scales, out),
                *(rows, inputs, outputs, groups, args.group_size, weight.shape[1]),
                BITS=args.bits,
                ROWS=_ROWS,
                OUTPUTS=_OUTPUTS,
                INPUTS=_INPUTS,
                enable_fp_fusion=False,
            )
    return out.view(*x.shape[:-1], outputs)
