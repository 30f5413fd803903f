"""Float32 products by oneDNN, where PyTorch would take slower ones.

PyTorch multiplies float32 matrices with MKL, which on processors of AMD takes vectors of 256 bits
where 512 are there: half the speed. oneDNN takes the wide ones. The only switch for it is the
permission to multiply in bfloat16, of which oneDNN makes no use where only vector units multiply,
since there float32 is as fast.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_SIZES = (64, 1000)
"""Rows of the products that are tried: few, and more than one block of a kernel."""


@contextmanager
def onednn_products() -> Iterator[None]:
    """Multiply float32 matrices with oneDNN in this block, if it then rounds as float32 does.

    Where it would round to bfloat16 (tile units, AMX), and where there is no oneDNN, nothing
    changes. The setting is one of the whole process, and is put back behind the block.
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
    """Whether 1 + 2^-20, which bfloat16 does not have, outlives the products of a layer and of its
    gradients."""
    weight, unit = torch.full((size, 96), 1 + 2.0**-20), torch.eye(96)
    x = weight.t().contiguous()
    products = (
        (weight @ unit, weight),
        (weight @ unit.t(), weight),
        (unit @ x, x),
        (unit @ weight.t(), x),
    )
    return all(bool((product == exact).all()) for product, exact in products)
