"""Training towards another model's next-token distributions instead of the next tokens of a text.

Hinton et al., "Distilling the knowledge in a neural network", 2015. A quantized model that imitates
the float one it was made of comes nearer to it, and does not learn its text by heart meanwhile (Liu
et al., "LLM-QAT: data-free quantization aware training for large language models", 2023).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from bkcore.errors import InputError


def divergence(model: nn.Module, teacher: PreTrainedModel, input_ids: Tensor) -> Tensor:
    """KL(teacher || model) of the next token in nats, mean over all positions of ids (B, N).

    Differentiable in the model's parameters; the teacher gets no gradient.
    """
    with torch.no_grad():
        wanted = teacher(input_ids=input_ids).logits.flatten(0, 1).float()
    found = model(input_ids=input_ids).logits.flatten(0, 1).float()
    return F.kl_div(
        found.log_softmax(-1), wanted.log_softmax(-1), log_target=True, reduction="batchmean"
    )


def check_teacher(model: PreTrainedModel, teacher: PreTrainedModel) -> None:
    """Raise `InputError` unless a model can learn from a teacher."""
    if teacher is model:
        raise InputError("a model learns nothing from itself: the teacher has to be another one")
    sizes = model.config.vocab_size, teacher.config.vocab_size
    if sizes[0] != sizes[1]:
        raise InputError(
            f"the teacher knows {sizes[1]} tokens, the model {sizes[0]}: they need one tokenizer"
        )


def fingerprint(teacher: PreTrainedModel) -> str:
    """SHA-256 of a teacher's parameters, by which a training that is resumed knows it again."""
    found = hashlib.sha256()
    for parameter in teacher.parameters():
        found.update(parameter.detach().cpu().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Switch dropout off inside a with block: a teacher's distributions are those without it."""
    layers = [module for module in model.modules() if isinstance(module, nn.Dropout)]
    before = [layer.p for layer in layers]
    try:
        for layer in layers:
            layer.p = 0.0
        yield
    finally:
        for layer, p in zip(layers, before, strict=True):
            layer.p = p
