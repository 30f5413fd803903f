"""The engine gives the bits that the model's modules give one by one, and takes over only then."""

from __future__ import annotations

import copy
import dataclasses
import gc
import itertools
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from bkcore import LanguageModel, ResNetBKForCausalLM
from bkcore.errors import BackendError, InputError, ShapeError
from bkcore.kernels import use_backend
from bkcore.kernels.backends.cpu import native
from bkcore.model import engine
from bkcore.model.engine import use_engine
from bkcore.model.moe import counting_load
from tests.model.single_tokens import MODES, assert_same_bits, model, read, tokens


@given(
    mode=st.sampled_from(MODES),
    batch=st.integers(1, 5),
    heads=st.sampled_from([(1, 1), (3, 3), (6, 2), (6, 1)]),
    key_size=st.sampled_from([1, 5, 16]),
    value_size=st.sampled_from([3, 12, 33]),
    experts=st.sampled_from([(1, 1), (2, 2), (7, 3)]),
    width=st.sampled_from([6, 24, 42]),
    taps=st.integers(1, 5),
    seed=st.integers(0, 99),
)
@settings(max_examples=40, deadline=None)
def test_sizes(mode, batch, heads, key_size, value_size, experts, width, taps, seed):
    made = model(
        mode,
        seed=seed,
        d_model=width,
        num_heads=heads[0],
        key_groups=heads[1],
        key_size=key_size,
        value_size=value_size,
        num_experts=experts[0],
        experts_per_token=experts[1],
        conv_width=taps,
        expert_size=width + 3,
    )
    assert_same_bits(made, tokens(batch, 5, seed=seed))


@pytest.mark.parametrize("isa", native.supported_isas())
@pytest.mark.parametrize("mode", MODES)
def test_every_instruction_set(mode, isa):
    with native.use_isa(isa):
        assert_same_bits(model(mode), tokens(3, 9))


@pytest.mark.parametrize("mode", MODES)
def test_the_reference(mode):
    """The engine's bits are those of plain PyTorch where that is exact: the attention is not."""
    made, ids = model(mode), tokens(2, 6)
    found, _ = read(made, ids, "always")
    with use_backend("reference"), torch.no_grad():
        expected = made(ids).logits
    assert torch.equal(found.argmax(-1), expected.argmax(-1))


@pytest.mark.parametrize("mode", MODES)
def test_a_stream_is_the_whole_text(mode):
    made, ids = model(mode), tokens(3, 40)
    with torch.no_grad():
        whole = made(ids).logits
    assert torch.equal(read(made, ids, "always")[0], whole)


def test_float_models_agree_to_rounding():
    made, ids = model(None), tokens(3, 40)
    (found, _), (expected, _) = (read(made, ids, choice) for choice in ("always", "never"))
    assert not torch.equal(found, expected)  # a float product has another order of sums
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", [None, *MODES])
def test_a_batch_is_its_sequences(mode):
    made, ids = model(mode), tokens(70, 4)
    logits, _ = read(made, ids, "always")
    for row in (0, 33, 69):
        assert torch.equal(read(made, ids[row : row + 1], "always")[0][0], logits[row])


@pytest.mark.parametrize("mode", [None, "ptq_int8", "ptq_int4"])
def test_threads_change_no_bit(mode):
    made = model(mode, d_model=96, num_heads=4, key_size=32, value_size=64, expert_size=600)
    ids, before = tokens(64, 3), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected, _ = read(made, ids, "always")
        torch.set_num_threads(3)
        assert torch.equal(read(made, ids, "always")[0], expected)
    finally:
        torch.set_num_threads(before)


def test_given_states_stay_as_they_are():
    made, ids = model("ptq_int8"), tokens(2, 3)
    _, state = read(made, ids[:, :2], "always")
    kept = copy.deepcopy(state)
    read(made, ids[:, 2:], "always")
    with torch.no_grad():
        made(ids[:, 2:], cache_params=state)
    for one, other in zip(state.layers, kept.layers, strict=True):
        assert torch.equal(one.psi, other.psi)
        assert torch.equal(one.taps, other.taps)
        assert torch.equal(one.g, other.g)


CHANGES: dict[str, Callable[[Any], object]] = {
    "a norm in place": lambda made: made.final_norm.weight.data.mul_(2),
    "a norm exchanged": lambda made: setattr(
        made.final_norm, "weight", nn.Parameter(2 * made.final_norm.weight.detach())
    ),
    "a norm's data": lambda made: setattr(
        made.final_norm.weight, "data", 2 * made.final_norm.weight.detach()
    ),
    "codes in place": lambda made: made.layers[0].mixer.in_proj.weight.packed.copy_(
        made.layers[0].mixer.in_proj.weight.packed.flip(0)
    ),
    "scales exchanged": lambda made: setattr(
        made.layers[0].mixer.in_proj.weight,
        "stored_scales",
        2 * made.layers[0].mixer.in_proj.weight.stored_scales,
    ),
    "a quantizer": lambda made: made.layers[1].mixer.quantizers.value.stored_scales.mul_(3),
    "a module": lambda made: made.layers[1].experts.experts.__setitem__(
        0, copy.deepcopy(made.layers[1].experts.experts[1])
    ),
    "a decay": lambda made: made.layers[0].mixer.log_rate.data.add_(1),
    "the multiplier": lambda made: setattr(made.config, "embedding_multiplier", 3.0),
    "all of it": lambda made: made.load_state_dict(model("ptq_int4", seed=5).state_dict()),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_are_noticed(change):
    made, ids = model("ptq_int4"), tokens(2, 4)
    before, _ = read(made, ids, "always")
    with torch.no_grad():
        CHANGES[change](made)
    assert not torch.equal(read(made, ids, "always")[0], before)
    assert_same_bits(made, ids)


def test_copies_have_engines_of_their_own():
    made, ids = model("ptq_int8"), tokens(2, 4)
    before, _ = read(made, ids, "always")
    for again in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        again.final_norm.weight.data.mul_(2)
        assert_same_bits(again, ids)
    assert torch.equal(read(made, ids, "always")[0], before)


def test_a_model_can_go():
    made = model("ptq_int8")
    read(made, tokens(1, 2), "always")
    seen = weakref.ref(made)
    del made
    gc.collect()
    assert seen() is None


REFUSED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "training": (lambda made: made.train(), "training mode"),
    "part in training": (lambda made: made.layers[0].mixer.train(), "training mode"),
    "hook": (lambda made: made.layers[0].register_forward_hook(lambda *x: None), "a hook"),
    "pre-hook": (
        lambda made: made.final_norm.register_forward_pre_hook(lambda *x: None),
        "a hook",
    ),
    "forward": (
        lambda made: setattr(made.final_norm, "forward", made.final_norm.forward),
        "forward pass of a module is replaced",
    ),
    "stranger": (
        lambda made: setattr(made.layers[0], "dropout", nn.Identity().eval()),
        "modules of other kinds: Identity",
    ),
    "double": (lambda made: made.double(), "not float32|is torch.float64"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_it_cannot_take_goes_through_the_modules(what):
    made, ids = model("ptq_int8"), tokens(2, 1)
    read(made, ids, "always")
    change, words = REFUSED[what]
    change(made)
    with torch.no_grad(), use_engine("always"), pytest.raises(BackendError, match=words):
        made(ids)
    with torch.no_grad():
        assert made(ids).logits.isfinite().all()


class Louder(ResNetBKForCausalLM):
    """A model whose forward pass is its own."""

    def forward(self, *args: Any, **options: Any) -> Any:
        output: Any = super().forward(*args, **options)
        output.logits = 2 * output.logits
        return output


def test_a_subclass_keeps_its_forward_pass():
    made, ids = model("ptq_int8"), tokens(2, 1)
    with torch.no_grad():
        expected = made(ids).logits
        made = copy.deepcopy(made)
        made.__class__ = Louder
        assert torch.equal(made(ids).logits, 2 * expected)
        with use_engine("always"), pytest.raises(BackendError, match="forward pass of its own"):
            made(ids)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_streams_are_the_same_without_it(temperature):
    made, ids = model("ptq_int4"), tokens(2, 4)
    found = []
    for choice in ("always", "never"):
        generator = torch.Generator().manual_seed(3)
        with use_engine(choice):
            stream = made.stream(ids, temperature=temperature, generator=generator)
            found.append([(token, state) for token, state in itertools.islice(stream, 6)])
    for (token, state), (other, expected) in zip(*found, strict=True):
        assert torch.equal(token, other)
        for a, b in zip(state.layers, expected.layers, strict=True):
            for one, another in ((a.taps, b.taps), (a.g, b.g), (a.psi, b.psi)):
                assert torch.equal(one, another)
        assert torch.equal(state.seen, expected.seen)


def test_counted_experts_go_through_the_modules():
    made, ids = model("ptq_int8"), tokens(2, 1)
    with torch.no_grad():
        expected = made(ids).logits
        with counting_load(made) as counts:
            assert torch.equal(made(ids).logits, expected)
    assert [int(count.sum()) for count in counts] == [4, 4]


def test_a_forced_backend_goes_through_the_modules():
    made, ids = model("ptq_int8"), tokens(2, 1)
    refused = pytest.raises(BackendError, match="backend reference is forced")
    with torch.no_grad(), use_engine("always"), use_backend("reference"), refused:
        made(ids)
    with torch.no_grad(), use_backend("cpu"), use_engine("always"):
        made(ids)


def test_gradients_go_through_the_modules():
    made, ids = model(None), tokens(2, 1)
    made(ids).logits.sum().backward()
    assert made.final_norm.weight.grad is not None


ASKED: dict[str, tuple[Callable[[], Any], str]] = {
    "gradients": (lambda: model(None)(tokens(2, 1)), "no gradients; use torch.no_grad"),
    "labels": (
        lambda: model("ptq_int8")(tokens(2, 1), labels=tokens(2, 1)),
        "no loss; leave out the labels",
    ),
    "another mixer": (
        lambda: LanguageModel(50, 24, 1, mixer="convolution").eval()(tokens(2, 1)),
        'mixer "convolution" keeps no state',
    ),
}


@pytest.mark.parametrize("what", ASKED)
def test_always_raises_for_whatever_else_is_asked_of_one_token(what):
    ask, words = ASKED[what]
    ask()
    with use_engine("always"), pytest.raises(BackendError, match=words):
        ask()


def test_longer_texts_go_through_the_modules():
    with torch.no_grad(), use_engine("always"):
        assert model("ptq_int8")(tokens(2, 3)).logits.shape == (2, 3, 50)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_default_dtype_changes_nothing(dtype):
    made, ids = model("ptq_int8"), tokens(3, 4)
    expected, _ = read(made, ids, "always")
    torch.set_default_dtype(dtype)
    try:
        found, _ = read(made, ids, "always")
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


def test_the_default_device_changes_nothing():
    made, ids = model("ptq_int8"), tokens(3, 4)
    expected, _ = read(made, ids, "always")
    torch.set_default_device("meta")
    try:
        found, _ = read(copy.deepcopy(made), ids, "always")
    finally:
        torch.set_default_device(None)
    assert torch.equal(found, expected)


def test_autocast_goes_through_the_modules_of_a_float_model():
    made, ids = model(None), tokens(2, 1)
    read(made, ids, "always")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = made(ids).logits
        with use_engine("never"):
            assert torch.equal(found, made(ids).logits)
        with use_engine("always"), pytest.raises(BackendError, match="autocast is on"):
            made(ids)
    assert not torch.equal(found.float(), read(made, ids, "never")[0])


@pytest.mark.parametrize("mode", MODES)
def test_autocast_does_not_concern_a_quantized_model(mode):
    with torch.autocast("cpu", torch.bfloat16):
        assert_same_bits(model(mode), tokens(2, 3))


def test_states_of_other_formats_are_named():
    made, ids = model("ptq_int8"), tokens(1, 1)
    state = made.first_state(1)
    for words, x in {
        "torch.float64, not float32": state.layers[0].psi.double(),
        "a Strange, not a plain tensor": state.layers[0].psi.as_subclass(Strange),
        "on meta, not on the CPU": state.layers[0].psi.to("meta"),
        "a negated view": torch._neg_view(state.layers[0].psi),
    }.items():
        layer = dataclasses.replace(state.layers[0], psi=x)
        odd = dataclasses.replace(state, layers=(layer, *state.layers[1:]))
        with torch.no_grad(), use_engine("always"), pytest.raises(BackendError, match=words):
            made(ids, cache_params=odd)


class Strange(Tensor):
    """A tensor of a class that the engine does not know."""


def test_a_bad_choice_names_where_it_came_from(monkeypatch):
    monkeypatch.setattr(engine, "_environment", "sometimes")
    words = "BKCORE_ENGINE is set, but there is no choice 'sometimes' of the engine"
    with torch.no_grad(), pytest.raises(BackendError, match=words):
        model("ptq_int8")(tokens(1, 1))


def test_bad_input_raises():
    made = model("ptq_int8")
    for bad in (-1, 50):
        with torch.no_grad(), pytest.raises(InputError, match=rf"from {bad} to {bad}.* \[0, 50\)"):
            made(torch.tensor([[bad]]))
    with torch.no_grad(), pytest.raises(ShapeError, match="state of another model"):
        made(tokens(2, 1), cache_params=model("ptq_int8", key_size=5).first_state(2))
    state = made.first_state(2)
    short = dataclasses.replace(state.layers[0], psi=state.layers[0].psi[:1])
    state = dataclasses.replace(state, layers=(short, *state.layers[1:]))
    with (
        torch.no_grad(),
        pytest.raises(ShapeError, match=r"\[2, 2, 1\] sequences in taps"),
    ):
        made(tokens(2, 1), cache_params=state)
    state = dataclasses.replace(state, layers=made.first_state(2).layers[:1])
    with torch.no_grad(), pytest.raises(ShapeError, match="1 layers, but the model has 2"):
        made(tokens(2, 1), cache_params=state)
    with pytest.raises(BackendError, match="no choice 'sometimes'"), use_engine("sometimes"):
        pass
