"""Next-token cross entropy without holding the logits of all positions in memory.

Positions are processed in chunks. The gradient of a chunk is computed right after its loss, while
its logits are still in memory, and only the gradients of the hidden states and of the head are
kept. So no product is computed twice, and the extra memory is O(chunk * V). (The idea is the fused
linear cross entropy of Hsu et al., "Liger Kernel", 2024; here the head may be any module.)
"""

from __future__ import annotations

from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

IGNORED = -100
"""Label of a position without a label."""

_CHUNK_ELEMENTS = 1 << 22
_LEAST_ROWS = 256


class Head(Protocol):
    """A module that computes logits (T, V) from hidden states (T, D)."""

    def logits(self, hidden: Tensor) -> Tensor: ...


def next_token_loss(
    head: Head,
    hidden: Tensor,
    labels: Tensor,
    vocab_size: int,
    num_items_in_batch: Tensor | int | None = None,
) -> Tensor:
    """Mean negative log likelihood of the next tokens in nats.

    Equal, up to rounding, to the loss that transformers computes from all logits. Only first
    derivatives are available.

    Args:
        head: the module that computes logits; gradients reach its parameters.
        hidden: (B, N, D), the head's input.
        labels: integers (B, N), shifted here: position i predicts label i + 1; `IGNORED` is
            left out.
        vocab_size: V, which determines the chunk size.
        num_items_in_batch: divide the sum by this instead of the number of labels.

    Returns:
        A scalar, float32 or float64; NaN if there is no label to divide by.
    """
    targets = F.pad(labels[:, 1:], (0, 1), value=IGNORED).flatten().to(hidden.device)
    rows = max(_LEAST_ROWS, _CHUNK_ELEMENTS // vocab_size)
    total = _summed_loss(head, hidden.flatten(0, 1), targets, rows)
    count = (targets != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
    return total / (count.to(total.device) if isinstance(count, Tensor) else count)


def share_of_batch(labels: Tensor, num_items_in_batch: Tensor | int | None) -> Tensor | float:
    """The fraction of a whole batch's labels that `labels` (B, N) hold; 1 if they are all."""
    if num_items_in_batch is None:
        return 1.0
    here = (labels[:, 1:] != IGNORED).sum()
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(here.device)
    return here / num_items_in_batch


def _summed_loss(head: Head, hidden: Tensor, targets: Tensor, rows: int) -> Tensor:
    parameters = [p for p in cast(nn.Module, head).parameters() if p.requires_grad]
    if not (torch.is_grad_enabled() and (hidden.requires_grad or parameters)):
        pieces = zip(hidden.split(rows), targets.split(rows), strict=True)
        return torch.stack([_chunk_loss(head, *piece) for piece in pieces]).sum()
    return _ChunkedLoss.apply(head, rows, targets, hidden, *parameters)


def _chunk_loss(head: Head, hidden: Tensor, targets: Tensor) -> Tensor:
    logits = head.logits(hidden)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")


class _ChunkedLoss(torch.autograd.Function):
    """The summed loss. The forward pass computes its gradients; the backward pass scales them."""

    @staticmethod
    def forward(
        ctx: Any, head: Head, rows: int, targets: Tensor, hidden: Tensor, *parameters: Tensor
    ) -> Tensor:
        losses, slopes = [], []
        of_parameters = [torch.zeros_like(parameter) for parameter in parameters]
        for piece, wanted in zip(hidden.detach().split(rows), targets.split(rows), strict=True):
            with torch.enable_grad():
                piece.requires_grad_()
                loss = _chunk_loss(head, piece, wanted)
            slope, *others = torch.autograd.grad(loss, (piece, *parameters))
            losses.append(loss.detach())
            slopes.append(slope)
            for total, other in zip(of_parameters, others, strict=True):
                total += other
        ctx.save_for_backward(torch.cat(slopes), *of_parameters)
        return torch.stack(losses).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, None, *(grad.to(saved.dtype) * saved for saved in ctx.saved_tensors)
