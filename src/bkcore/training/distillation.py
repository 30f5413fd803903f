"""Distillation: train on another model's next-token distributions instead of a text's next tokens.

Hinton et al., "Distilling the knowledge in a neural network", 2015. A quantized model that imitates
its own float model gets closer to it, without memorizing the training text (Liu et al., "LLM-QAT:
data-free quantization aware training for large language models", 2023).
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

_ROOM = 2 * 2**30
"""Most bytes of a teacher's answers that are kept."""


class Teacher:
    """A model that gives next-token distributions; it can remember them for repeated windows.

    Each window is computed alone. A model may round it differently in a batch, so the answer would
    depend on the other windows and on what is remembered, and a resumed training would differ.
    float32 probabilities are stored in float16; rounding them changes a gradient by at most 2^-12
    of a probability.

    Args:
        model: in evaluation mode, and unchanged while it teaches.
        remembers: whether to keep its answers, in at most 2 GiB.
    """

    def __init__(self, model: PreTrainedModel, *, remembers: bool = False) -> None:
        self.model = model
        self._room = _ROOM if remembers else 0
        self._said: dict[bytes, tuple[Tensor, Tensor]] = {}

    def says(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Next-token probabilities (B * N, V) for ids (B, N), and their mean entropy in nats.

        Raises:
            InputError: if a probability is not finite.
        """
        probabilities, entropies = zip(*map(self._says, input_ids), strict=True)
        return torch.cat(probabilities), torch.stack(entropies).mean()

    @torch.no_grad()
    def _says(self, window: Tensor) -> tuple[Tensor, Tensor]:
        key = window.cpu().numpy().tobytes()
        if key in self._said:
            return self._said[key]
        logits: Tensor = self.model(input_ids=window[None]).logits[0]
        said = logits.softmax(-1, dtype=_float32_at_least(logits))
        if not bool(torch.isfinite(said).all()):
            raise InputError(
                "the teacher's logits are not finite; did its training diverge? use another teacher"
            )
        if said.dtype == torch.float32:
            said = said.half()
        # The entropy of the rounded probabilities, so that equal distributions have divergence 0.
        entropy = torch.special.entr(said.to(_float32_at_least(said))).sum(-1).mean()
        size = said.numel() * said.element_size()
        if size <= self._room:
            self._room -= size
            self._said[key] = said, entropy
        return said, entropy


def divergence(model: nn.Module, teacher: Teacher, input_ids: Tensor) -> Tensor:
    """KL(teacher || model) of the next token in nats, averaged over all positions of ids (B, N).

    Returns a scalar, float32 or float64, differentiable in the model's parameters. The teacher gets
    no gradient.
    """
    logits: Tensor = model(input_ids=input_ids).logits.flatten(0, 1)
    dtype = _float32_at_least(logits)
    wanted, entropy = teacher.says(input_ids)
    return F.cross_entropy(logits.to(dtype), wanted.to(dtype)) - entropy.to(dtype)


def _float32_at_least(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def check_teacher(model: PreTrainedModel, teacher: PreTrainedModel) -> None:
    """Raise `InputError` unless the model can learn from the teacher."""
    if not isinstance(teacher, PreTrainedModel):
        raise InputError(f"the teacher must be a transformers model, not {teacher!r}")
    if teacher is model:
        raise InputError("the teacher is the model itself; give another model")
    if {id(x) for x in model.parameters()} & {id(x) for x in teacher.parameters()}:
        raise InputError(
            "the teacher shares parameters with the model and would change in training; give a "
            "copy, copy.deepcopy(teacher)"
        )
    if is_sharded(teacher):
        raise InputError("a sharded teacher is not supported; each process needs the whole teacher")
    sizes = model.config.vocab_size, teacher.config.vocab_size
    if sizes[0] != sizes[1]:
        raise InputError(
            f"the teacher has a vocabulary of {sizes[1]} tokens, but the model of {sizes[0]}; they "
            "must use the same tokenizer"
        )


def fingerprint(teacher: PreTrainedModel) -> str:
    """SHA-256 of a teacher's configuration and tensors, for a resumed training to recognize it."""
    found = hashlib.sha256(teacher.config.to_json_string().encode())
    for name, tensor in teacher.state_dict().items():
        found.update(name.encode())
        found.update(tensor.detach().cpu().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Switch off dropout layers inside a with block, since the teacher runs without dropout.

    Does not use `eval()`, which would also switch off activation checkpointing.
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
