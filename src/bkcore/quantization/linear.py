"""Integer products with quantized weights: INT8 activations per token, int32 sums, one rescale.

Training (QAT) uses the very same forward; only its backward is float, straight through. So the
converted model equals the trained one bit for bit by construction.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bkcore.quantization import affine
from bkcore.quantization.weights import HalfWeight, PackedWeight, TrainableWeight


def quantize_tokens(x: Tensor) -> tuple[Tensor, Tensor]:
    """INT8 codes (M, K) and float32 scales (M, 1) of the rows of x; symmetric, max |x| is 127.

    A row of zeros gets the scale 1. A row with NaN or infinity gets a scale that is not finite,
    and so does every product with it.
    """
    largest = x.abs().amax(-1, keepdim=True)
    scale = torch.where(largest == 0, 1.0, largest / affine.code_range(8)[1])
    # The quotient is at most 127 up to rounding, so there is nothing to clamp.
    return (x / scale).round_().to(torch.int8), scale


def integer_product(
    codes: Tensor, token_scale: Tensor, weight_codes: Tensor, weight_scales: Tensor, group_size: int
) -> Tensor:
    """Rows of activations times the rows of a weight, both as int8 codes.

    The order of roundings, the same everywhere: int32 sums inside a group are exact, each becomes
    float32 and is multiplied by its weight scale; groups are added from first to last; the token's
    scale comes last.

    Args:
        codes, token_scale: int8 (M, K) and float32 (M, 1), from `quantize_tokens`.
        weight_codes, weight_scales: int8 (O, K) and float32 (O, G).
        group_size: inputs that share a weight scale.

    Returns:
        float32 (M, O).
    """
    if codes.shape[1] == 1:  # torch._int_mm reads beyond a matrix of one column (2.13)
        codes, weight_codes = F.pad(codes, (0, 1)), F.pad(weight_codes, (0, 1))
    total: Tensor | None = None
    for group, scale in enumerate(weight_scales.unbind(1)):
        columns = slice(group * group_size, (group + 1) * group_size)
        sums = torch._int_mm(codes[:, columns], weight_codes[:, columns].t())
        term = sums * scale
        total = term if total is None else total.add_(term)
    assert total is not None
    return total.mul_(token_scale)


class _StraightThroughProduct(torch.autograd.Function):
    """Integer forward; backward as if the dequantized operands had been multiplied in float."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, values: Tensor, weight_codes: Tensor, scales: Tensor, group_size: int
    ) -> Tensor:
        codes, token_scale = quantize_tokens(x)
        ctx.save_for_backward(codes, token_scale, values)
        return integer_product(codes, token_scale, weight_codes, scales, group_size)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        codes, token_scale, values = ctx.saved_tensors
        grad = grads[0]
        return grad @ values, grad.t() @ (codes * token_scale), None, None, None


def project(x: Tensor, weight: PackedWeight | TrainableWeight | HalfWeight) -> Tensor:
    """x (..., K) times a quantized weight (O, K), transposed: (..., O) in the dtype of x.

    Whatever that dtype is, the product and its scales are those of float32.
    """
    rows = x.reshape(-1, x.shape[-1]).float()
    if isinstance(weight, HalfWeight):
        out = F.linear(rows, weight.packed.float())
    elif isinstance(weight, PackedWeight):
        codes, token_scale = quantize_tokens(rows)
        out = integer_product(
            codes, token_scale, weight.codes(), weight.scales(), weight.group_size
        )
    else:
        weight_codes, values = weight.codes_and_values()
        scales = weight.scales().detach()
        out = _StraightThroughProduct.apply(rows, values, weight_codes, scales, weight.group_size)
    return out.view(*x.shape[:-1], -1).to(x.dtype)


class QuantizedLinear(nn.Module):
    """A linear layer without bias whose weight is packed, trainable (QAT) or in float16."""

    def __init__(self, weight: PackedWeight | TrainableWeight | HalfWeight) -> None:
        super().__init__()
        self.weight = weight

    @property
    def is_exact(self) -> bool:
        """Whether a row of the result is the same, bit for bit, whatever other rows there are."""
        return not isinstance(self.weight, HalfWeight)

    def forward(self, x: Tensor) -> Tensor:
        """x real (..., K) -> (..., O) in the dtype of x."""
        return project(x, self.weight)


class QuantizedEmbedding(nn.Module):
    """Token embedding whose rows also are the output head, quantized once for both uses."""

    def __init__(self, weight: PackedWeight | TrainableWeight | HalfWeight) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, input_ids: Tensor) -> Tensor:
        """Embeddings float32 (..., K) of integer ids (...)."""
        return self.weight.rows(input_ids)

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores (..., V) of hidden states (..., K), in their dtype."""
        return project(hidden, self.weight)
