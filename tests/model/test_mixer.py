"""The mixers: resolvent attention, and the two that leave parts of it out."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bkcore.core import resolvent_attention
from bkcore.errors import LifecycleError
from bkcore.kernels.recall import over_memory
from bkcore.model import LanguageModel, ResNetBKForCausalLM
from bkcore.model.config import MIXER_TRAITS
from bkcore.model.functions import ShortConvolution, unit_length
from bkcore.model.mixer import MIXERS, ResolventMixer, after_nothing
from bkcore.text import TokenWindows
from bkcore.training import Schedule, train

SIZES = {"num_heads": 3, "key_size": 5}


@pytest.fixture(params=["resolvent", "convolution", "green"])
def model(request, build):
    return build(mixer=request.param, **SIZES)


@torch.no_grad()
@pytest.mark.parametrize("length", [1, 2, 33, 200])
def test_no_logit_sees_the_future_or_another_sequence(model, tokens, length):
    ids = tokens(3, length)
    logits = model(ids).logits
    assert torch.isfinite(logits).all()
    for position in {0, length // 2, length - 1}:
        changed = ids.clone()
        changed[1, position] = (changed[1, position] + 1) % model.config.vocab_size
        other = model(changed).logits
        assert torch.equal(other[1, :position], logits[1, :position])
        assert torch.equal(other[[0, 2]], logits[[0, 2]])
        assert not torch.equal(other[1, position], logits[1, position])


@torch.no_grad()
def test_only_a_core_reaches_beyond_the_convolution(model, tokens):
    ids = tokens(1, 64)
    changed = ids.clone()
    changed[0, 10] = (changed[0, 10] + 1) % model.config.vocab_size
    reach = model.config.n_layers * (model.config.conv_width - 1)
    after = slice(10 + reach + 1, None)
    same = torch.equal(model(changed).logits[0, after], model(ids).logits[0, after])
    assert same == (model.config.mixer == "convolution")


@torch.no_grad()
def test_saved_and_loaded_bit_for_bit(model, tokens, tmp_path):
    model.save_pretrained(tmp_path)
    again = ResNetBKForCausalLM.from_pretrained(tmp_path).eval()
    ids = tokens(2, 40)
    assert again.config.mixer == model.config.mixer
    assert torch.equal(again(ids).logits, model(ids).logits)
    state, loaded = model.state_dict(), again.state_dict()
    assert state.keys() == loaded.keys()
    assert all(torch.equal(state[name], loaded[name]) for name in state)


@pytest.mark.parametrize("mixer", ["resolvent", "convolution", "green"])
def test_every_parameter_trains(build, tokens, mixer):
    model = build(mixer=mixer, **SIZES).train()
    ids = tokens(3, 40)
    model(ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


@torch.no_grad()
def test_a_new_layer_looks_for_what_followed_earlier_copies():
    torch.manual_seed(0)
    model = LanguageModel(vocab_size=50, d_model=128, n_layers=1, mixer="resolvent")
    mixer = model.layers[0].mixer
    assert isinstance(mixer, ResolventMixer)
    x = torch.randn(16, 40, 128)
    x[:, 30] = x[:, 7]
    mixed = mixer.conv(after_nothing(mixer.in_proj(x)[..., : mixer.sizes[0]], mixer.conv))
    query, key = mixed[..., 128:].chunk(2, -1)
    scores = (key[:, :31] * query[:, 30, None]).sum(-1)
    assert (scores.argmax(1) == 8).all()


def test_it_learns_to_copy():
    """Tokens of the second half repeat the first: no convolution of width 4 can say which."""
    torch.manual_seed(0)
    text = torch.cat([half.repeat(2) for half in torch.randint(1, 40, (2000, 16))])
    schedule = Schedule(steps=300, batch_size=16, learning_rate=5e-3)
    losses = {}
    for mixer in ("resolvent", "convolution"):
        torch.manual_seed(0)
        model = LanguageModel(
            vocab_size=40, d_model=64, n_layers=1, expert_size=64, num_experts=1,
            experts_per_token=1, mixer=mixer, num_heads=2,
        )  # fmt: skip
        losses[mixer] = train(model, TokenWindows(text, 32), schedule)[-1]["loss"]
    # Guessing costs log 39 = 3.66, and half of that is the least a model with a memory can pay.
    # After 300 steps the two stand at 3.64 and 2.71.
    assert losses["convolution"] > 3.5
    assert losses["resolvent"] < 3.1


@torch.no_grad()
@pytest.mark.parametrize("name", MIXERS)
def test_its_traits_are_what_it_can_do(build, name):
    mixer, traits = build(mixer=name).layers[0].mixer, MIXER_TRAITS[name]
    _, state = mixer(torch.randn(1, 5, 24))
    assert traits.has_heads == hasattr(mixer, "heads")
    assert traits.streams == (state is not None)
    assert traits.quantizes == hasattr(mixer, "quantizers")


def test_every_mixer_has_traits():
    assert MIXERS.keys() == MIXER_TRAITS.keys()


def test_what_is_there_to_compare_with_cannot_be_quantized(build):
    for mixer in ("convolution", "green"):
        with pytest.raises(LifecycleError, match="cannot be quantized"):
            build(mixer=mixer, **SIZES).configure_quantization("ptq_int8")
        with pytest.raises(LifecycleError, match="cannot be quantized"):
            LanguageModel(vocab_size=40, mixer=mixer, use_quantized_bk_core=True)


@pytest.mark.parametrize(("length", "channels", "taps"), [(1, 48, 4), (9, 50, 3), (300, 64, 1)])
def test_the_convolution_is_the_same_with_and_without_a_derivative(length, channels, taps):
    torch.manual_seed(0)
    conv = ShortConvolution(channels, taps)
    x = torch.randn(3, length + taps - 1, channels)
    expected = conv(x)
    oracle = conv.double()(x.double())
    conv.float()
    with torch.no_grad():
        whole = conv(x)
        # One rounding for each of `taps` products and sums, of numbers below 5 * 5; SiLU, whose
        # slope is at most 1.1, rounds six times more.
        torch.testing.assert_close(
            whole.double(), oracle, rtol=6 * 2.0**-24, atol=2.2 * taps * 25 * 2.0**-24
        )
        torch.testing.assert_close(whole, expected, rtol=0, atol=4 * taps * 25 * 2.0**-24)
        for first in range(0, length, 4):  # a part of a text has the same bits
            part = x[:1, first : first + 3 + taps]
            assert torch.equal(conv(part), whole[:1, first : first + 4])


@pytest.mark.parametrize("copies", [1, 2, 30])
def test_copies_add_up_to_the_root_of_their_number(copies):
    """A memory of n sites alike: R_ij = 1 and w = n, so that n copies of u are found as n^(1/2) u.

    What is left out is of order (eta n^2)^2 = 1e-18; rounding errors add up to some n^2 u.
    """
    one = torch.ones(1, copies, 1, 1, dtype=torch.float64)
    value = torch.tensor([2.0, -3.0], dtype=torch.float64).expand(1, copies, 1, 2)
    eta = torch.tensor([2.0**-40], dtype=torch.float64)
    out, g, _ = resolvent_attention(one, one, value, one[..., 0], 0 * one[..., 0], eta)
    memory = g.imag / eta
    number = torch.arange(1, copies + 1, dtype=torch.float64)[None, :, None]
    torch.testing.assert_close(memory, number, rtol=1e-12, atol=0)
    real, _ = over_memory(out.real, out.imag, memory, eta)
    torch.testing.assert_close(real, value * number[..., None].sqrt(), rtol=1e-12, atol=0)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**32), length=st.integers(1, 40), log_eta=st.floats(-12, 0))
def test_what_is_found_is_never_larger_than_the_values(seed, length, log_eta):
    """|Re out_iu| <= w^(1/2) (sum_j u_ju^2)^(1/2) for queries and keys of unit length."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    query, key = (unit_length(normal(1, length, 2, 3), 1e-6) for _ in range(2))
    assert query.square().sum(-1).max() <= 1
    value = normal(1, length, 2, 4)
    hopping, potential = normal(1, length, 2).sigmoid(), normal(1, length, 2).square()
    eta = torch.full((2,), 10.0**log_eta, dtype=torch.float64)
    out, g, _ = resolvent_attention(query, key, value, hopping, potential, eta)
    real, imag = over_memory(out.real, out.imag, g.imag / eta, eta)
    most = value.square().cumsum(1).sqrt()
    assert (real.abs() <= most * (1 + 1e-6)).all()
    assert torch.isfinite(imag).all()
