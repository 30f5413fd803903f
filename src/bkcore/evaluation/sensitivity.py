r"""Sensitivity: what it costs to quantize each weight of a model, measured one at a time.

Everything stays float except the current unit, which is packed as it would be saved and multiplied
as it would be served, with INT8 activations. Two measures come from the same forward passes on the
same tokens: the change of the loss, and the mean divergence KL(float || quantized) of the
next-token distributions. The divergence is what the change of the loss would be if the float
model's distribution were the true one. It is never negative, and its sampling error is far smaller.
The change of the loss has a part of first order in the rounding errors, which averages out only
over many tokens and hides the effect of a single expert.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bkcore.errors import LifecycleError
from bkcore.model import ResNetBKForCausalLM
from bkcore.model.conversion import packed_alone, quantizable, storage_bytes
from bkcore.quantization.config import QuantizationConfig


@dataclass(frozen=True)
class Sensitivity:
    """The effect of quantizing one unit alone.

    Attributes:
        unit: name of the layer, or of the expert.
        bits: 4 or 8.
        bytes: size of its quantized weights, including scales.
        loss_change: change of the mean loss, in nats per token.
        divergence: mean KL(float || quantized), in nats per token.
    """

    unit: str
    bits: int
    bytes: int
    loss_change: float
    divergence: float


def units(model: ResNetBKForCausalLM) -> dict[str, list[str]]:
    """Names of the weights in each unit: an expert's two matrices together, any other alone."""
    found: dict[str, list[str]] = {}
    for slot in quantizable(model):
        unit = slot.name.rpartition(".")[0] if slot.part == "expert" else slot.name
        found.setdefault(unit, []).append(slot.name)
    return found


def measure(
    model: ResNetBKForCausalLM,
    config: QuantizationConfig,
    batches: Sequence[Tensor],
    bits: Sequence[int] = (4, 8),
    on_progress: Callable[[float], None] = lambda fraction: None,
) -> list[Sensitivity]:
    """Quantize each unit alone, in each width.

    Args:
        model: float, in evaluation mode; restored afterwards.
        config: group size and granularity of the weights.
        batches: token ids (B, N), N >= 2. The float model's log-probabilities for all of them are
            kept in memory, 4 bytes per position and vocabulary entry.
        bits: widths, 4 or 8.
        on_progress: called with the fraction done.

    Raises:
        LifecycleError: if the weights are already quantized.
    """
    if model.quantization_state not in ("float", "calibrated"):
        raise LifecycleError(
            f"sensitivity is measured on a float model, but this one is "
            f"{model.quantization_state.value}"
        )
    with torch.inference_mode():
        reference = [_log_probabilities(model, batch) for batch in batches]
        cases = [(unit, names, b) for unit, names in units(model).items() for b in bits]
        found = []
        for unit, names, width in cases:
            alone = replace(config, tensor_bits=dict.fromkeys(names, width))
            with packed_alone(model, alone, names):
                layers = [slot.layer for slot in quantizable(model) if slot.name in names]
                size = sum(map(storage_bytes, layers))
                found.append(Sensitivity(unit, width, size, *_change(model, batches, reference)))
            on_progress(len(found) / len(cases))
    return found


def _log_probabilities(model: ResNetBKForCausalLM, batch: Tensor) -> Tensor:
    """float32 (B, N - 1, V): log-probabilities of what follows each token except the last."""
    logits: Tensor = model(batch).logits
    return logits[:, :-1].float().log_softmax(-1)


def _change(
    model: ResNetBKForCausalLM, batches: Sequence[Tensor], reference: Sequence[Tensor]
) -> tuple[float, float]:
    """The change of the loss and the divergence from the reference, averaged over tokens."""
    loss = divergence = 0.0
    tokens = 0
    for batch, log_p in zip(batches, reference, strict=True):
        change = _log_probabilities(model, batch) - log_p
        loss -= change.gather(-1, batch[:, 1:, None]).double().sum().item()
        # sum p (q/p - 1 - log q/p) is the divergence, since q and p sum to one. Without q/p - 1,
        # the first-order terms would cancel only up to rounding.
        divergence += (log_p.exp() * (change.expm1() - change)).sum(-1).double().sum().item()
        tokens += change.shape[0] * change.shape[1]
    return loss / tokens, divergence / tokens
