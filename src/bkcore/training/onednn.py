"""Use oneDNN for float32 products where PyTorch's default is slower.

PyTorch multiplies float32 matrices with MKL. On AMD processors MKL uses 256-bit vectors even if the
processor has 512-bit ones, at half the speed; oneDNN uses the wide ones. The only way to select it
is to allow products in bfloat16. Without matrix units, oneDNN still computes in float32, since it
is as fast there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_SIZES = (64, 1000)
"""Rows of the test products: few, and more than one block of a kernel."""


@contextmanager
def onednn_products() -> Iterator[None]:
    """Multiply float32 matrices with oneDNN in this block, if it really computes in float32.

    If it would round to bfloat16 (with tile units, AMX), or is not available, nothing changes. The
    setting applies to the whole process, and is restored after the block.
    """
    matmul: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    try:
        matmul.fp32_precision = "bf16"
        if not all(_is_exact(size) for size in _SIZES):
            matmul.fp32_precision = before
        yield
    finally:
        matmul.fp32_precision = before


def _is_exact(size: int) -> bool:
    """Whether 1 + 2^-20, which bfloat16 cannot represent, survives the products of a layer and of
    its gradients."""
    weight, unit = torch.full((size, 96), 1 + 2.0**-20), torch.eye(96)
    x = weight.t().contiguous()
    products = (
        (weight @ unit, weight),
        (weight @ unit.t(), weight),
        (unit @ x, x),
        (unit @ weight.t(), x),
    )
    return all(bool((product == exact).all()) for product, exact in products)
