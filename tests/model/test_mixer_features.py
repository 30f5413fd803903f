"""Values of any width, keys that heads share, and what is read out of both."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.functional import silu

from bkcore.model import (
    LanguageModel,
    ResNetBKConfig,
    ResNetBKForCausalLM,
    core_certificates,
    receipt,
)
from bkcore.model.mixer import Features, ResolventMixer, gated

WIDE: dict[str, Any] = {"value_size": 9, "key_groups": 2}


def randomize(model: Any) -> None:
    for layer in model.layers:
        torch.nn.init.normal_(layer.mixer.features.weight)


@pytest.mark.parametrize(("value_size", "width"), [(None, 24), (1, 4), (9, 36)])
@pytest.mark.parametrize("mixer", ["resolvent", "convolution", "green"])
def test_sizes(build, tokens, value_size, width, mixer):
    model = build(value_size=value_size, mixer=mixer)
    assert model.layers[0].mixer.out_proj.weight.shape == (24, width)
    ids, other = tokens(2, 20), tokens(2, 20)
    logits = model(ids).logits
    assert logits.isfinite().all()
    other[:, :10] = ids[:, :10]
    assert torch.equal(model(other).logits[:, :10], logits[:, :10])


def test_features_are_a_gated_sum():
    torch.manual_seed(0)
    features = Features(9)
    value, opening = torch.randn(2, 3, 50, 9)
    parts = torch.randn(3, 50, 2, 9)
    torch.nn.init.normal_(features.weight)
    stacked = torch.stack((value, *parts.unbind(2)))
    expected = torch.einsum("fw,fbnw->bnw", features.weight, stacked) * silu(opening)
    torch.testing.assert_close(gated(features(value, parts), opening), expected)


def test_heads_of_a_group_share_queries_and_keys():
    """Their own queries and keys, made equal, find the same."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 61, "d_model": 24, "num_heads": 6, "key_size": 7}
    shared: Any = ResolventMixer(ResNetBKConfig(**sizes, key_groups=2))
    apart: Any = ResolventMixer(ResNetBKConfig(**sizes))
    for mixer in (shared, apart):
        mixer.reset()
        mixer.features.reset()
    values, keys = 24, 2 * 7
    rows = [torch.arange(values)]
    for first in (values, values + keys):
        rows += [first + 7 * group + torch.arange(7) for group in (0, 0, 0, 1, 1, 1)]
    mixed = torch.cat(rows)
    rest = torch.arange(values + 2 * keys, shared.in_proj.out_features)
    with torch.no_grad():
        apart.in_proj.weight.copy_(shared.in_proj.weight[torch.cat((mixed, rest))])
        apart.conv.weight.copy_(shared.conv.weight[mixed])
        apart.out_proj.weight.copy_(shared.out_proj.weight)
    x = torch.randn(2, 50, 24)
    torch.testing.assert_close(shared(x)[0], apart(x)[0])


def test_they_begin_with_the_value_and_re():
    model: Any = LanguageModel(61, d_model=24, n_layers=1, key_size=7, **WIDE)
    weight = model.layers[0].mixer.features.weight
    assert torch.equal(weight, torch.tensor([[1.0], [1.0], [0.1]]).expand(3, 36))


@torch.no_grad()
def test_a_stream_has_the_same_codes(build, tokens, mode, tmp_path):
    model = build(mode, "quantized", **WIDE)
    randomize(model)
    ids = tokens(2, 60)
    whole = model(ids).logits
    state = model.first_state(2)
    for index in range(60):
        output = model(ids[:, index : index + 1], cache_params=state)
        state = output.cache_params
        assert (output.logits[:, 0] - whole[:, index]).abs().max() < 1e-4 * whole.abs().max()
    model.save_pretrained(tmp_path)
    assert torch.equal(ResNetBKForCausalLM.from_pretrained(tmp_path).eval()(ids).logits, whole)


def test_what_qat_trains_is_what_is_converted(build, tokens):
    model = build("qat_int4", "training", **WIDE)
    ids = tokens(2, 30)
    model.train()(ids, labels=ids).loss.backward()
    assert all((p.grad != 0).any() for p in model.parameters())
    with torch.no_grad():
        trained = model.eval()(ids).logits
        model.convert()
        assert torch.equal(model(ids).logits, trained)
    assert {entry["levels"] for entry in model.receipt["activations"]} == {"learned"}
    assert {entry["reason"] for entry in model.receipt["float"]} >= {
        "features: three numbers for each channel"
    }
    assert not [p for p in receipt.problems(model.receipt) if "no calibration data" not in p]


def test_the_cores_are_certified(build, tokens, mode):
    model = build(mode, "quantized", **WIDE)
    for certificate in core_certificates(model, tokens(2, 40)):
        assert certificate.error.shape == (2, 40, 2, 36)
        assert (certificate.error <= certificate.bound).all()
