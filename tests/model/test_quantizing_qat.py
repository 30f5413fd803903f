"""Quantization-aware training of the language model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from bkcore.errors import LifecycleError
from bkcore.model import conversion
from bkcore.training import Schedule, train

pytestmark = pytest.mark.parametrize("mode", ["qat_int8", "qat_int4"])


@torch.no_grad()
@pytest.mark.parametrize("length", [1, 5, 200])
def test_the_converted_model_is_the_trained_one_bit_for_bit(build, tokens, mode, length):
    model = build(mode, "training")
    ids = tokens(3, length)
    expected = model(ids).logits
    model.convert()
    assert torch.equal(model(ids).logits, expected)


@torch.no_grad()
def test_evaluation_equals_the_training_forward(build, tokens, mode):
    """Integer experts need no padding, and nothing else differs between train() and eval()."""
    model = build(mode, "training")
    ids = tokens(3, 20)
    assert torch.equal(model.train()(ids).logits, model.eval()(ids).logits)


def test_gradients_reach_every_parameter(build, tokens, mode):
    model = build(mode, "training").train()
    ids = tokens(8, 32)
    model(ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.any(), name


def test_training_lowers_the_loss_and_survives_conversion(build, tokens, mode):
    model = build(mode)
    ids = tokens(8, 32)
    model.calibrate_quantization([ids])
    model.train()
    core_quantizers = [q for c in conversion.core_quantizers(model) for q in c.parts()]
    scales = [quantizer.scales.detach().clone() for quantizer in core_quantizers]
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    losses = []
    for _ in range(20):
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    # Random tokens can only be memorized; a fixed batch of 248 gives way quickly.
    assert losses[-1] < losses[0] - 0.5
    for before, quantizer in zip(scales, core_quantizers, strict=True):
        assert not torch.equal(quantizer.scales, before)
        assert (quantizer.scales > 0).all()
    model.eval()
    with torch.no_grad():
        expected = model(ids, labels=ids)
        model.convert()
        found = model(ids, labels=ids)
    assert torch.equal(found.logits, expected.logits)
    assert torch.equal(found.loss, expected.loss)
    # The auxiliary loss, a hundredth of a number near 1, is not in the evaluation loss.
    assert found.loss < losses[0] - 0.5


def test_training_beats_rounding_afterwards(build, tokens, mode):
    """Both start from one float model; QAT trains on the batch that both are measured on."""
    ids = tokens(8, 32)
    rounded, nearest, trained = build(mode.replace("qat", "ptq")), build(), build(mode)
    nearest.configure_quantization(
        replace(rounded.quant_config, weight_rounding="nearest")  # as training rounds
    )
    for model in (rounded, nearest, trained):
        model.calibrate_quantization([ids])
    with torch.no_grad():
        # Before any step the two are one and the same function.
        assert torch.equal(trained(ids).logits, nearest(ids).logits)
    items: Any = [{"input_ids": row, "labels": row} for row in ids]
    train(trained, items, Schedule(steps=10, batch_size=8, learning_rate=3e-3))
    trained.eval().convert()
    with torch.no_grad():
        gain = rounded(ids, labels=ids).loss - trained(ids, labels=ids).loss
    assert gain > 0.2


def test_a_converted_model_is_not_trained(build, tokens, mode):
    data: Any = [{"input_ids": ids, "labels": ids} for ids in tokens(4, 8)]
    with pytest.raises(LifecycleError, match="its weights are codes, which cannot be trained"):
        train(build(mode, "quantized"), data, Schedule(1, 2, 1e-3))
