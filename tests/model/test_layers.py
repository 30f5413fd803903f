"""Layers: what training keeps of them, and what enters the first."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments

from tests.model.helpers import TRAINABLE, gradients


def checkpointed(model):
    twin = copy.deepcopy(model)
    twin.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    return twin


@pytest.mark.filterwarnings("error::FutureWarning")
@pytest.mark.parametrize("form", TRAINABLE)
def test_checkpointing_changes_no_bit_of_a_gradient(build, tokens, form):
    model = build(*form).train()
    ids = tokens(3, 40)
    twin = checkpointed(model)
    calls = []
    for layer in twin.layers:
        layer.mixer.register_forward_hook(lambda *_: calls.append(1))
    own = gradients(twin, input_ids=ids, labels=ids)
    assert len(calls) == 2 * len(twin.layers), "nothing was computed again"
    true = gradients(model, input_ids=ids, labels=ids)
    assert own.keys() == true.keys()
    assert all(torch.equal(own[name], true[name]) for name in true)


def test_the_trainer_checkpoints(build, tokens, tmp_path):
    """`gradient_checkpointing=True` reaches the same weights, bit for bit."""
    items = [{"input_ids": row, "labels": row} for row in tokens(8, 16)]
    found = []
    for wanted in (False, True):
        model = build()
        calls: list[int] = []
        model.layers[0].mixer.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        arguments = TrainingArguments(
            output_dir=tmp_path,
            use_cpu=True,
            max_steps=2,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            gradient_checkpointing=wanted,
            gradient_checkpointing_kwargs={"use_reentrant": False},
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        Trainer(model, arguments, train_dataset=items).train()
        assert len(calls) == (8 if wanted else 4)
        found.append(dict(model.named_parameters()))
    plain, twin = found
    assert all(torch.equal(plain[name], twin[name]) for name in plain)


def test_checkpointing_repeats_random_numbers(build, tokens):
    """A layer that draws, such as one with dropout, draws the same again."""

    def add_dropout(model):
        for layer in model.layers:
            layer.mixer.register_forward_hook(lambda _, __, out: (F.dropout(out[0], 0.3), out[1]))
        return model

    model = build().train()
    ids = tokens(2, 30)
    found = []
    for each in (add_dropout(checkpointed(model)), add_dropout(copy.deepcopy(model))):
        torch.manual_seed(3)
        found.append(gradients(each, input_ids=ids, labels=ids))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[1])
    torch.manual_seed(4)
    other = gradients(add_dropout(copy.deepcopy(model)), input_ids=ids, labels=ids)
    assert not all(torch.equal(other[name], found[1][name]) for name in other)


def test_checkpointing_keeps_less(build, tokens):
    """Bytes that the graph saves for the backward pass."""
    model, ids = build(), tokens(1, 256)

    def saved_bytes(model) -> int:
        sizes = {}

        def pack(tensor: Tensor) -> Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = model.train()(ids, labels=ids).loss
        assert loss.requires_grad
        return sum(sizes.values())

    assert saved_bytes(checkpointed(model)) < 0.4 * saved_bytes(model)


@pytest.mark.parametrize("mode", [None, "ptq_int4", "qat_int8"])
def test_the_multiplier_is_of_what_enters_the_residual_stream(build, tokens, mode):
    """Tables of embeddings twice as large behind half of it enter alike, in codes, too."""
    ids = tokens(2, 20)
    entered = []
    for multiplier, size in ((5.0, 1.0), (2.5, 2.0)):
        model = build(embedding_multiplier=multiplier)
        with torch.no_grad():
            model.embedding.weight *= size
        if mode is not None:
            model.configure_quantization(mode)
            model.calibrate_quantization([ids])
        norm = model.layers[0].mixer_norm
        hook = norm.register_forward_pre_hook(lambda _, inputs: entered.append(inputs[0]))
        model(ids)
        hook.remove()
    assert torch.equal(entered[-1], entered[len(entered) // 2 - 1])
    assert 0.5 < entered[-1].square().mean().sqrt() < 2


def test_dropout_is_for_training_only(build, tokens):
    ids = tokens(2, 20)
    plain, model = build(), build(dropout=0.3)
    assert torch.equal(model(ids).logits, plain(ids).logits)
    model.train()
    first = model(ids).logits
    assert not torch.equal(first, model(ids).logits)
    torch.manual_seed(5)
    once = model(ids).logits
    torch.manual_seed(5)
    assert torch.equal(model(ids).logits, once)
