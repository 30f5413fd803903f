"""Whatever changes what the modules compute makes the engine stand back, and names itself."""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bkcore import ResNetBKConfig, ResNetBKForCausalLM
from bkcore.errors import BackendError
from bkcore.model import engine, meddling
from bkcore.model.engine import use_engine
from bkcore.model.functions import RMSNorm
from bkcore.model.moe import Expert
from tests.model.single_tokens import MODES, assert_same_bits, model, read, tokens


def assert_stands_back(made: Any, words: str, ids: Tensor | None = None) -> None:
    ids = tokens(2, 2) if ids is None else ids
    assert torch.equal(read(made, ids, "auto")[0], read(made, ids, "never")[0])
    with torch.no_grad(), use_engine("always"), pytest.raises(BackendError, match=words):
        made(ids[:, :1])


def replace_config(made: Any) -> None:
    made.config = ResNetBKConfig.from_dict({**made.config.to_dict(), "norm_eps": 0.1})


# A change, what the error says of it, and whether the modules then compute something else.
SIZES: dict[str, tuple[Callable[[Any], object], str, bool]] = {
    "experts": (
        lambda made: setattr(made.layers[0].experts, "experts_per_token", 1),
        r"experts_per_token of layers.0.experts is 1, but the configuration says 2",
        True,
    ),
    "eps": (lambda made: setattr(made.final_norm, "eps", 9.0), "eps of final_norm is 9.0", True),
    "eps of keys": (
        lambda made: setattr(made.layers[1].mixer, "norm_eps", 0.1),
        "norm_eps of layers.1.mixer is 0.1",
        True,
    ),
    "experts in the config": (
        lambda made: setattr(made.config, "experts_per_token", 1),
        "experts_per_token of layers.0.experts is 2, but the configuration says 1",
        False,
    ),
    "another config": (replace_config, "1e-06, but the configuration says 0.1", False),
    "no config at all": (
        lambda made: setattr(made.config, "num_heads", "four"),
        "num_heads is not an integer",
        False,
    ),
    "a module's class": (
        lambda made: setattr(made.layers[0].experts.router, "__class__", nn.Linear),
        "layers.0.experts.router is a Linear, not a Router",
        False,
    ),
}


@pytest.mark.parametrize("what", SIZES)
@pytest.mark.parametrize("mode", [None, "ptq_int8"])
def test_sizes_that_are_not_those_of_the_config(mode, what):
    change, words, changes = SIZES[what]
    made = model(mode)
    before, _ = read(made, tokens(2, 2), "always")
    change(made)
    assert_stands_back(made, words)
    found, _ = read(made, tokens(2, 2), "auto")
    assert changes == (not torch.allclose(found, before, rtol=1e-3, atol=1e-3))


def test_sizes_of_many_parts():
    for path, name, value in [
        ("layers.0.mixer", "sizes", (80, 20, 12)),
        ("layers.0.mixer", "groups", 2),
        ("layers.0.mixer.in_proj.weight", "group_size", 7),
        ("layers.0.mixer.in_proj.weight", "bits", 8),
        ("layers.1.mixer.quantizers.value", "bits", 8),
        ("layers.1.mixer.quantizers.found.real", "group_size", 2),
    ]:
        made = model("ptq_int4")
        setattr(made.get_submodule(path), name, value)
        refused = pytest.raises(BackendError, match=re.escape(f"{name} of {path} is {value}, but"))
        with torch.no_grad(), use_engine("always"), refused:
            made(tokens(1, 1))


@pytest.mark.parametrize("mode", [None, *MODES])
def test_a_config_of_its_own_makes_no_difference(mode):
    made = model(mode, num_heads=6, key_groups=2, value_size=5)
    made.config = copy.deepcopy(made.config)
    made.config.n_seq, made.config.note = 9, "mine"
    read(made, tokens(2, 2), "always")


def turn(made: Any) -> None:
    weight = made.layers[0].mixer.out_proj.weight
    assert weight.shape == (24, 24)
    weight.data = weight.data.t()


def turn_in_place(made: Any) -> None:
    with torch.no_grad():
        made.layers[0].mixer.out_proj.weight.t_()


def cut(made: Any) -> None:
    made.embedding.weight.data = made.embedding.weight.data[:20]


def regroup(made: Any) -> None:
    packed = made.layers[0].mixer.in_proj.weight.packed
    packed.data = packed.data.view(torch.uint8)


LAYOUTS: dict[str, tuple[str | None, Callable[[Any], object], str]] = {
    "turned": (None, turn, r"\(24, 24\) with strides \(1, 24\).*contiguous\(\)"),
    "turned in place": (None, turn_in_place, r"out_proj.weight is .* with strides \(1, 24\)"),
    "cut": (None, cut, r"embedding.weight is \(20, 24\)"),
}


@pytest.mark.parametrize("sees", [True, False])
@pytest.mark.parametrize("what", LAYOUTS)
def test_layouts(what, sees, monkeypatch):
    if not sees:  # as with an older PyTorch
        monkeypatch.setattr(engine, "_EXCHANGE", None)
    mode, change, words = LAYOUTS[what]
    made, ids = model(mode), tokens(2, 3) % 20
    read(made, ids, "always")
    bound = engine._bound[made]
    read(made, ids, "always")
    assert engine._bound[made] is bound
    change(made)
    assert_stands_back(made, words, ids)


@pytest.mark.parametrize("sees", [True, False])
def test_codes_of_another_format(sees, monkeypatch):
    if not sees:
        monkeypatch.setattr(engine, "_EXCHANGE", None)
    made = model("ptq_int8")
    read(made, tokens(1, 1), "always")
    regroup(made)
    with torch.no_grad(), use_engine("always"), pytest.raises(BackendError, match="packed is"):
        made(tokens(1, 1))


class Traced(Tensor):
    """A tensor of a class that the engine does not know."""


def test_a_tensor_of_another_class():
    made = model("ptq_int8")
    weight = made.layers[0].mixer.in_proj.weight
    weight.stored_scales = weight.stored_scales.as_subclass(Traced)
    words = "in_proj.weight.stored_scales is a Traced, not a plain tensor"
    with torch.no_grad(), use_engine("always"), pytest.raises(BackendError, match=words):
        made(tokens(1, 1))


def doubled(function: Any) -> Any:
    @functools.wraps(function)
    def other(*args: Any, **options: Any) -> Any:
        return 2 * function(*args, **options)

    return other


@pytest.mark.parametrize(
    ("kind", "name"),
    [(RMSNorm, "forward"), (Expert, "perceptron"), (Expert, "forward"), (nn.Dropout, "forward")],
)
def test_methods_replaced_in_a_class(kind, name, monkeypatch):
    made = model("ptq_int8")
    before, _ = read(made, tokens(2, 2), "always")
    with monkeypatch.context() as patched:
        patched.setattr(kind, name, doubled(getattr(kind, name)))
        assert_stands_back(made, f"{kind.__name__}.{name} is replaced")
    assert torch.equal(read(made, tokens(2, 2), "always")[0], before)


def test_methods_replaced_in_the_class_of_models(monkeypatch):
    made = model("ptq_int8")
    read(made, tokens(2, 2), "always")
    whole = ResNetBKForCausalLM._embedded
    monkeypatch.setattr(ResNetBKForCausalLM, "_embedded", doubled(whole))
    assert_stands_back(made, "its class has a _embedded of its own")


def same_name(method: str) -> type[nn.Module]:
    """A subclass that looks like the class of models, but computes something else."""

    def other(self: Any, *args: Any, **options: Any) -> Any:
        found = getattr(super(kind, self), method)(*args, **options)
        if method == "_embedded":
            return 2 * found
        if method == "_hidden":
            return (2 * found[0], *found[1:])
        if method == "forward":
            found.logits = 2 * found.logits
        return found

    other.__qualname__ = f"ResNetBKForCausalLM.{method}"
    kind = type("ResNetBKForCausalLM", (ResNetBKForCausalLM,), {method: other})
    return kind


@pytest.mark.parametrize("method", ["forward", "_hidden", "_embedded", "_computing", "__call__"])
def test_subclasses_with_methods_of_their_own(method):
    made = model("ptq_int8")
    read(made, tokens(2, 2), "always")
    made.__class__ = same_name(method)
    assert_stands_back(made, "its class has a .* of its own")


def test_other_subclasses_use_the_engine():
    made = model("ptq_int8")
    made.__class__ = type("Mine", (ResNetBKForCausalLM,), {"generate": None, "extra": 3})
    assert_same_bits(made, tokens(2, 3))


def test_methods_replaced_at_an_object():
    made = model("ptq_int8")
    read(made, tokens(2, 2), "always")
    made.embedding.logits = doubled(made.embedding.logits)
    assert_stands_back(made, "the logits of a module is replaced")
    del made.embedding.logits
    made._embedded = doubled(made._embedded)
    assert_stands_back(made, "the _embedded of a module is replaced")
    del made._embedded
    made.generate = functools.partial(made.generate, pad_token_id=0)
    assert_same_bits(made, tokens(2, 3))


def test_attributes_that_hide_a_tensor_or_a_module():
    made = model("ptq_int8")
    read(made, tokens(2, 2), "always")
    vars(made.final_norm)["weight"] = 2 * made.final_norm.weight.detach()
    assert_stands_back(made, "the weight of a module is replaced")
    del vars(made.final_norm)["weight"]
    vars(made.layers[0])["experts"] = copy.deepcopy(made.layers[1].experts)
    assert_stands_back(made, "the experts of a module is replaced")


def test_layers_in_another_order():
    made = model("ptq_int8")
    read(made, tokens(2, 2), "always")
    made.layers._modules["0"] = made.layers._modules.pop("0")
    assert_stands_back(made, "another order than its names: 1, 0")


def test_modules_that_contain_each_other():
    made = model("ptq_int8")
    made.layers[0].owner = made
    words = "its modules contain each other"
    with torch.no_grad(), use_engine("always"), pytest.raises(BackendError, match=words):
        made(tokens(1, 1))


def test_reading_a_config_changes_no_random_numbers():
    made = model("ptq_int8")
    meddling._as_built.cache_clear()
    torch.manual_seed(3)
    expected = torch.randn(3)
    torch.manual_seed(3)
    read(made, tokens(1, 1), "always")
    assert torch.equal(torch.randn(3), expected)
