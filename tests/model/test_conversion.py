"""The layers of every mode and state: none stays float in silence."""

from __future__ import annotations

import copy
import importlib

import pytest
import torch
from torch import nn

from bkcore.model import conversion
from bkcore.quantization import QuantizationConfig
from bkcore.quantization.linear import QuantizedEmbedding, QuantizedLinear
from bkcore.quantization.weights import HalfWeight, PackedWeight, TrainableWeight
from tests.model.helpers import expected_bits


def test_nothing_stays_float_in_silence(build, mode):
    model = build(mode, "quantized")
    found = list(conversion.quantizable(model))
    # Two matrices in every mixer and in every expert, and the embedding.
    assert [slot.part for slot in found].count("core") == 2 * 2
    assert [slot.part for slot in found].count("expert") == 2 * 4 * 2
    assert [slot.part for slot in found].count("head") == 1
    for slot in found:
        layer, part = slot.layer, slot.part
        assert isinstance(layer, QuantizedEmbedding if part == "head" else QuantizedLinear)
        bits = expected_bits(mode, part)
        if bits == 16:
            assert type(layer.weight) is HalfWeight
            assert layer.weight.packed.dtype == torch.float16
        else:
            assert type(layer.weight) is PackedWeight
            assert layer.weight.bits == bits
            assert layer.weight.packed.dtype == {8: torch.int8, 4: torch.uint8}[bits]
            assert layer.weight.group_size == (16 if bits == 4 else layer.weight.shape[1])
    matrices = {name for name, p in model.named_parameters() if p.dim() == 2}
    small = ("experts.router.weight", "mixer.features.weight")
    assert matrices == {f"layers.{i}.{name}" for i in range(2) for name in small}
    linears = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Embedding)]
    assert len(linears) == 2  # the routers
    for quantizers in conversion.core_quantizers(model):
        assert quantizers.phase == "quantize"
        assert len(quantizers.parts()) == 7
        channels = [4, 4, 28, 28, 24, 24, 24]  # 4 heads, keys of 7, 24 values
        assert [quantizer.num_groups for quantizer in quantizers.parts()] == channels
        for quantizer in quantizers.parts():
            assert quantizer.calibrated
            assert not quantizer.learnable
            assert quantizer.bits == expected_bits(mode, "core")
    assert len(conversion.core_quantizers(model)) == 2


@pytest.mark.parametrize("mode", ["qat_int8", "qat_int4"])
def test_training_replaces_every_matrix_by_a_trainable_one(build, mode):
    model = build(mode, "training")
    for slot in conversion.quantizable(model):
        weight = slot.layer.weight
        assert type(weight) is TrainableWeight
        assert weight.bits == expected_bits(mode, slot.part)
    assert all(q.learnable for c in conversion.core_quantizers(model) for q in c.parts())


@torch.no_grad()
def test_every_quantizer_of_the_core_is_used(build, tokens, mode):
    """A quantizer with another scale must change the logits: none is skipped."""
    model = build(mode, "quantized")
    # Barriers move little: it takes some tokens until a code behind them turns.
    ids = tokens(2, 60)
    expected = model(ids).logits
    count = len(conversion.core_quantizers(model)[0].parts())
    for layer in range(2):
        for index in range(count):
            other = copy.deepcopy(model)
            quantizer = conversion.core_quantizers(other)[layer].parts()[index]
            quantizer.stored_scales.mul_(1.5)
            assert not torch.equal(other(ids).logits, expected), (layer, index)


def test_per_tensor_has_one_scale(build, tokens):
    model = build()
    model.configure_quantization(QuantizationConfig("ptq_int8", per_channel=False, min_size=0))
    model.calibrate_quantization([tokens(2, 20)])
    for quantizers in conversion.core_quantizers(model):
        assert [quantizer.num_groups for quantizer in quantizers.parts()] == [1] * 7
    for slot in conversion.quantizable(model):
        assert len(slot.layer.weight.scales().unique()) == 1


@pytest.mark.parametrize(
    ("symmetric", "expected"),
    [
        (None, [False] * 5 + [True, True]),
        (True, [True] * 7),
        (False, [False] * 7),
    ],
)
def test_symmetric_rules_every_quantizer_of_the_core(build, tokens, symmetric, expected):
    model = build()
    model.configure_quantization(QuantizationConfig("ptq_int8", symmetric=symmetric))
    model.calibrate_quantization([tokens(2, 20)])
    parts = conversion.core_quantizers(model)[0].parts()
    assert [quantizer.symmetric for quantizer in parts] == expected


def test_its_old_name_warns():
    old = importlib.import_module("bkcore.model.quantized")
    with pytest.warns(DeprecationWarning, match="is bkcore.model.conversion.quantizable now"):
        assert old.quantizable is conversion.quantizable
