"""Values of any width, keys that heads share, and features that are added."""

from __future__ import annotations

import pytest
import torch

from bkcore.errors import InputError
from bkcore.model import (
    LanguageModel,
    ResNetBKConfig,
    ResNetBKForCausalLM,
    core_certificates,
    receipt,
)
from bkcore.model.mixer import ResolventMixer

WIDE = {"value_size": 9, "add_features": True, "key_groups": 2}


def randomize(model: ResNetBKForCausalLM) -> None:
    for layer in model.layers:
        torch.nn.init.normal_(layer.mixer.features.weight)


@pytest.mark.parametrize(("value_size", "width"), [(None, 24), (1, 4), (9, 36)])
@pytest.mark.parametrize("add_features", [False, True])
@pytest.mark.parametrize("mixer", ["resolvent", "convolution", "green"])
def test_sizes(build, tokens, value_size, width, add_features, mixer):
    model = build(value_size=value_size, add_features=add_features, mixer=mixer)
    layer = model.layers[0].mixer
    features = 1 if add_features or mixer == "convolution" else 3
    assert layer.out_proj.weight.shape == (24, features * width)
    ids, other = tokens(2, 20), tokens(2, 20)
    logits = model(ids).logits
    assert logits.isfinite().all()
    other[:, :10] = ids[:, :10]
    assert torch.equal(model(other).logits[:, :10], logits[:, :10])


def test_added_features_are_side_by_side_ones_behind_a_thinner_projection():
    torch.manual_seed(0)
    sizes = {"vocab_size": 61, "d_model": 24, "key_size": 7, "value_size": 9}
    added = ResolventMixer(ResNetBKConfig(**sizes, add_features=True))
    apart = ResolventMixer(ResNetBKConfig(**sizes))
    for mixer in (added, apart):
        mixer.reset()
    torch.nn.init.normal_(added.features.weight)
    with torch.no_grad():
        for name in ("in_proj", "conv"):
            getattr(apart, name).weight.copy_(getattr(added, name).weight)
        blocks = [added.out_proj.weight * weight for weight in added.features.weight]
        apart.out_proj.weight.copy_(torch.cat(blocks, 1))
    x = torch.randn(2, 50, 24)
    torch.testing.assert_close(added(x)[0], apart(x)[0], rtol=1e-4, atol=1e-5)


def test_heads_of_a_group_share_queries_and_keys():
    """Their own queries and keys, made equal, find the same."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 61, "d_model": 24, "num_heads": 6, "key_size": 7}
    shared = ResolventMixer(ResNetBKConfig(**sizes, key_groups=2))
    apart = ResolventMixer(ResNetBKConfig(**sizes))
    for mixer in (shared, apart):
        mixer.reset()
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
    model = LanguageModel(61, d_model=24, n_layers=1, key_size=7, **WIDE)
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


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(InputError, match="num_heads=5 must divide d_model=24, or value_size"):
        ResNetBKConfig(vocab_size=61, d_model=24, num_heads=5)
    assert ResNetBKConfig(vocab_size=61, d_model=24, num_heads=5, value_size=6).value_width == 30
    with pytest.raises(InputError, match="value_size must be None or a positive integer, not 0"):
        ResNetBKConfig(vocab_size=61, value_size=0)
    with pytest.raises(InputError, match="key_groups=3 must divide num_heads=4"):
        ResNetBKConfig(vocab_size=61, num_heads=4, key_groups=3)
