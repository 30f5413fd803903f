"""Integer products with quantized weights: INT8 activations per token, int32 sums, one rescale.

QAT uses exactly the same forward pass (`bkcore.kernels.ops.product`); only its backward pass is
float, straight through. So the converted model equals the trained one bit for bit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bkcore.kernels import dense_product, in_order, product, round_rows
from bkcore.kernels.backends.selection import keep_choice, kept_choice
from bkcore.quantization import affine
from bkcore.quantization.weights import HalfWeight, PackedWeight, TrainableWeight


class _StraightThroughProduct(torch.autograd.Function):
    """Integer forward; backward as if the dequantized operands had been multiplied in float."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, values: Tensor, weight_codes: Tensor, scales: Tensor, group_size: int
    ) -> Tensor:
        keep_choice(ctx)
        ctx.save_for_backward(x, values)
        # 4-bit codes are also valid 8-bit codes, and the scales are storable values.
        return product(x, weight_codes, scales.to(affine.SCALE_DTYPE), group_size, 8)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, values = ctx.saved_tensors
        with kept_choice(ctx):
            rounded = round_rows(x)
        return grads[0] @ values, grads[0].t() @ rounded, None, None, None


def project(x: Tensor, weight: PackedWeight | TrainableWeight | HalfWeight) -> Tensor:
    """x (..., K) times a quantized weight (O, K), transposed: (..., O) in the dtype of x.

    Whatever that dtype is, the product and its scales are computed in float32.
    """
    if isinstance(weight, PackedWeight):
        codes = weight.packed, weight.stored_scales, weight.group_size, weight.bits
        if x.dtype == torch.float32:  # even a conversion to the same dtype takes time
            return product(x.detach(), *codes)
        return product(x.detach().float(), *codes).to(x.dtype)
    rows = x.reshape(-1, x.shape[-1]).float()
    if isinstance(weight, HalfWeight):
        half = weight.packed
        out = dense_product(rows, half) if in_order(rows) else F.linear(rows, half.float())
    else:
        weight_codes, values = weight.codes_and_values()
        scales = weight.scales().detach()
        out = _StraightThroughProduct.apply(rows, values, weight_codes, scales, weight.group_size)
    return out.view(*x.shape[:-1], out.shape[-1]).to(x.dtype)


class QuantizedLinear(nn.Module):
    """A linear layer without bias whose weight is packed, trainable (QAT) or in float16."""

    def __init__(self, weight: PackedWeight | TrainableWeight | HalfWeight) -> None:
        super().__init__()
        self.weight = weight

    @property
    def is_exact(self) -> bool:
        """Whether each row of the result is the same, bit for bit, whatever the other rows."""
        return not isinstance(self.weight, HalfWeight)

    def forward(self, x: Tensor) -> Tensor:
        """x real (..., K) -> (..., O) in the dtype of x."""
        return project(x, self.weight)


class QuantizedEmbedding(nn.Module):
    """Token embedding that is also the output head, quantized once for both uses."""

    def __init__(self, weight: PackedWeight | TrainableWeight | HalfWeight) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, input_ids: Tensor) -> Tensor:
        """Embeddings float32 (..., K) of integer ids (...)."""
        return self.weight.rows(input_ids)

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores (..., V) of hidden states (..., K), in their dtype."""
        return project(hidden, self.weight)
