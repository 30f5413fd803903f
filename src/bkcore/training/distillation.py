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
from bkcore.training.sharding import is_sharded


def divergence(model: nn.Module, teacher: PreTrainedModel, input_ids: Tensor) -> Tensor:
    """KL(teacher || model) of the next token in nats, mean over all positions of ids (B, N).

    A scalar, float32 or float64. Differentiable in the model's parameters; the teacher gets no
    gradient.
    """
    with torch.no_grad():
        wanted = _log_probabilities(teacher, input_ids)
    found = _log_probabilities(model, input_ids)
    return F.kl_div(found, wanted.to(found.dtype), log_target=True, reduction="batchmean")


def _log_probabilities(model: nn.Module, input_ids: Tensor) -> Tensor:
    """(B * N, V), float32 at least."""
    logits: Tensor = model(input_ids=input_ids).logits.flatten(0, 1)
    return logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))


def check_teacher(model: PreTrainedModel, teacher: PreTrainedModel) -> None:
    """Raise `InputError` unless a model can learn from a teacher."""
    if not isinstance(teacher, PreTrainedModel):
        raise InputError(f"the teacher has to be a model, not {teacher!r}")
    if teacher is model:
        raise InputError("a model learns nothing from itself: the teacher has to be another one")
    if is_sharded(teacher):
        raise InputError("a sharded teacher is not supported: it has to be whole in each process")
    sizes = model.config.vocab_size, teacher.config.vocab_size
    if sizes[0] != sizes[1]:
        raise InputError(
            f"the teacher knows {sizes[1]} tokens, the model {sizes[0]}: they need one tokenizer"
        )


def fingerprint(teacher: PreTrainedModel) -> str:
    """SHA-256 of a teacher's configuration and tensors, by which a resumed training knows it."""
    found = hashlib.sha256(teacher.config.to_json_string().encode())
    for name, tensor in teacher.state_dict().items():
        found.update(name.encode())
        found.update(tensor.detach().cpu().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Switch dropout layers off inside a with block: a teacher's distributions are those without.

    Not by `eval()`, which would switch off activation checkpointing, too.
    """
    layers = [module for module in model.modules() if isinstance(module, nn.Dropout)]
    before = [layer.p for layer in layers]
    try:
        for layer in layers:
            layer.p = 0.0
        yield
    finally:
        for layer, p in zip(layers, before, strict=True):
            layer.p = p
