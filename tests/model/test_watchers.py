"""What of PyTorch watches or changes the operations of a model makes the engine stand back."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from bkcore.errors import BackendError
from bkcore.model import engine, watchers
from bkcore.model.engine import use_engine
from tests.model.single_tokens import assert_same_bits, model, read, tokens


def test_nothing_watches_here():
    assert watchers.watcher() is None


def test_vmap():
    made, ids = model("ptq_int8", num_experts=1, experts_per_token=1), tokens(3, 2, 1)
    read(made, ids[0], "always")
    with torch.no_grad():
        with use_engine("never"):
            expected = torch.stack([made(x).logits for x in ids])
        assert torch.equal(torch.func.vmap(lambda x: made(x).logits)(ids), expected)
        with use_engine("always"), pytest.raises(BackendError, match=r"torch\.func"):
            torch.func.vmap(lambda x: made(x).logits)(ids)
    assert_same_bits(made, ids[0])


def test_forward_differentiation():
    made, ids = model("ptq_int8"), tokens(2, 1)
    read(made, ids, "always")
    refused = pytest.raises(BackendError, match="forward-mode differentiation")
    with torch.no_grad(), forward_ad.dual_level(), use_engine("always"), refused:
        made(ids)


@pytest.mark.filterwarnings("ignore:.*jit.trace", "ignore::torch.jit.TracerWarning")
def test_trace():
    made, ids = model("ptq_int8", num_experts=1, experts_per_token=1), tokens(2, 1)
    made.requires_grad_(False)
    read(made, ids, "always")
    traced = torch.jit.trace(lambda x: made(x).logits, ids, check_trace=False)
    for other in (ids, tokens(2, 1, seed=5)):
        with use_engine("never"):
            expected = made(other).logits
        assert torch.equal(traced(other), expected)
    with use_engine("always"), pytest.raises(BackendError, match="PyTorch traces"):
        torch.jit.trace(lambda x: made(x).logits, ids, check_trace=False)


class Counting(TorchDispatchMode):
    """Counts operations."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


class Watching(TorchFunctionMode):
    """Counts calls of functions."""

    count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", [Counting, Watching])
def test_modes(mode):
    made, ids = model("ptq_int8"), tokens(2, 1)
    read(made, ids, "always")
    with torch.no_grad(), mode() as counting:
        made(ids)
    assert counting.count > 50
    refused = pytest.raises(BackendError, match="a mode of PyTorch watches")
    with torch.no_grad(), use_engine("always"), mode(), refused:
        made(ids)
    assert_same_bits(made, ids)


def test_hooks_of_all_modules():
    made, ids = model("ptq_int8"), tokens(2, 1)
    read(made, ids, "always")
    seen: list[Tensor] = []
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *x: seen.append(x[2]))
    try:
        with torch.no_grad():
            made(ids)
            with use_engine("always"), pytest.raises(BackendError, match="a hook is registered"):
                made(ids)
    finally:
        handle.remove()
    assert len(seen) > 10
    assert_same_bits(made, ids)


@pytest.mark.parametrize(
    ("place", "name"),
    [
        (torch._C, "_len_torch_dispatch_stack"),
        (torch._C._functorch, "peek_interpreter_stack"),
        (torch.nn.modules.module, "_has_any_global_hook"),
        (forward_ad, "_current_level"),
    ],
)
def test_a_pytorch_that_lacks_a_name_turns_the_engine_off(place, name, monkeypatch):
    spec = importlib.util.spec_from_file_location("lacking", watchers.__file__)
    assert spec is not None
    assert spec.loader is not None
    lacking = importlib.util.module_from_spec(spec)
    with monkeypatch.context() as patched:
        patched.delattr(place, name)
        spec.loader.exec_module(lacking)
    monkeypatch.setattr(engine, "watcher", lacking.watcher)
    made = model("ptq_int8")
    with torch.no_grad():
        made(tokens(1, 1))
        words = f"one cannot ask PyTorch .* what watches a model .*{name}"
        with use_engine("always"), pytest.raises(BackendError, match=words):
            made(tokens(1, 1))
