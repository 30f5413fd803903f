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

_ROOM = 2 * 2**30
"""Bytes of what a teacher said that are kept."""


class Teacher:
    """What a model says comes after every token of a window; asked once where windows come again.

    A window is asked for alone, because a model may round it differently among others, and what
    is learned from it must not depend on which those are, or on whether it was remembered: a
    resumed training would be another one. Probabilities in float32 are taken in float16, whose
    rounding moves a gradient by 2^-12 of a probability at most.

    Args:
        model: in evaluation mode, and not changed while it teaches.
        remembers: whether to keep what was said, in at most 2 GiB.
    """

    def __init__(self, model: PreTrainedModel, *, remembers: bool = False) -> None:
        self.model = model
        self._room = _ROOM if remembers else 0
        self._said: dict[bytes, tuple[Tensor, Tensor]] = {}

    def says(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Probabilities of the next tokens of ids (B, N), (B * N, V), and their mean entropy.

        Raises:
            InputError: if they are not finite.
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
            raise InputError("the teacher's logits are not finite: a model of NaN teaches nothing")
        if said.dtype == torch.float32:
            said = said.half()
        # Of the rounded ones, so that the divergence from them is 0 where it ought to be.
        entropy = torch.special.entr(said.to(_float32_at_least(said))).sum(-1).mean()
        size = said.numel() * said.element_size()
        if size <= self._room:
            self._room -= size
            self._said[key] = said, entropy
        return said, entropy


def divergence(model: nn.Module, teacher: Teacher, input_ids: Tensor) -> Tensor:
    """KL(teacher || model) of the next token in nats, mean over all positions of ids (B, N).

    A scalar, float32 or float64. Differentiable in the model's parameters; the teacher gets no
    gradient.
    """
    logits: Tensor = model(input_ids=input_ids).logits.flatten(0, 1)
    dtype = _float32_at_least(logits)
    wanted, entropy = teacher.says(input_ids)
    return F.cross_entropy(logits.to(dtype), wanted.to(dtype)) - entropy.to(dtype)


def _float32_at_least(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def check_teacher(model: PreTrainedModel, teacher: PreTrainedModel) -> None:
    """Raise `InputError` unless a model can learn from a teacher."""
    if not isinstance(teacher, PreTrainedModel):
        raise InputError(f"the teacher has to be a model, not {teacher!r}")
    if teacher is model:
        raise InputError("a model learns nothing from itself: the teacher has to be another one")
    if {id(x) for x in model.parameters()} & {id(x) for x in teacher.parameters()}:
        raise InputError(
            "the teacher shares parameters with the model, and would change as it learns: give a "
            "copy, copy.deepcopy(teacher)"
        )
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
