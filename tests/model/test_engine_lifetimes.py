"""An engine keeps nothing of its model alive, and belongs to one thread's call at a time."""

from __future__ import annotations

import functools
import gc
import sys
import threading
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

from bkcore import QuantizationConfig
from bkcore.kernels.backends.cpu import native
from bkcore.model import engine
from tests.model.single_tokens import model, read, tokens


def own_generate(made: Any) -> None:
    made.generate = functools.partial(made.generate, pad_token_id=0)


def own_list(made: Any) -> None:
    made.layers[0].owner = [made]


def own_tuple(made: Any) -> None:
    made.layers[0].mixer.owner = ("it", (made,))


def own_dict(made: Any) -> None:
    made.config.owner = {"it": made}


def own_closure(made: Any) -> None:
    made.layers[0].experts.owner = lambda: made


def own_hook(made: Any) -> None:
    made.layers[0].register_forward_hook(lambda *x: made and None)


def own_class(made: Any) -> None:
    made.__class__ = type("Mine", (type(made),), {"owner": made})


OWNERS = [own_generate, own_list, own_tuple, own_dict, own_closure, own_hook, own_class]


@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize("refer", OWNERS)
def test_a_model_that_refers_to_itself_can_go(refer, later):
    made = model("ptq_int8")
    if later:
        made.layers[0].owner = []
        read(made, tokens(1, 2), "auto")
        made.layers[0].owner.append(made)
    refer(made)
    read(made, tokens(1, 2), "auto")
    seen = weakref.ref(made)
    del made
    gc.collect()
    assert seen() is None


def test_a_model_goes_at_once():
    made = model("ptq_int8")
    gc.collect()
    gc.disable()
    try:
        read(made, tokens(1, 2), "always")
        seen = weakref.ref(made.layers[0].mixer.log_eta)
        found = weakref.ref(made)
        del made
        assert found() is None
        assert seen() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("mode", [None, "ptq_int8"])
def test_weights_that_are_moved_away_can_go(mode):
    made = model(mode)
    read(made, tokens(1, 2), "always")
    seen = [weakref.ref(x) for x in (*made.parameters(), *made.buffers())]
    made.to_empty(device="meta")
    assert all(x is None or x.is_meta for x in (reference() for reference in seen))


def test_weights_that_are_quantized_can_go():
    made = model(None)
    read(made, tokens(1, 2), "always")
    layers = [made.layers[0].mixer.in_proj, made.layers[1].experts.experts[0].up, made.embedding]
    seen = [weakref.ref(x) for layer in layers for x in (layer, layer.weight)]
    del layers
    made.configure_quantization(QuantizationConfig("ptq_int8", observer="minmax"))
    made.calibrate_quantization([tokens(4, 40)])
    gc.collect()
    assert [x() for x in seen if x() is not None] == []


def test_another_thread_that_needs_another_engine():
    """It asks whenever the first thread is about to use its own."""
    made, ids = model("ptq_int8"), tokens(2, 3)
    expected, _ = read(made, ids, "always")
    turns = []

    def other() -> None:
        handle = made.final_norm.register_forward_hook(lambda *x: None)
        read(made, ids, "auto")
        handle.remove()

    def watch(frame: Any, event: str, _: object) -> None:
        code = frame.f_code
        if event == "call" and code.co_name == "step" and code.co_filename == engine.__file__:
            turns.append(code)
            thread = threading.Thread(target=other)
            thread.start()
            thread.join()

    sys.setprofile(watch)
    try:
        found, _ = read(made, ids, "always")
    finally:
        sys.setprofile(None)
    assert len(turns) >= 3
    assert torch.equal(found, expected)


def test_threads_that_always_need_another_engine(monkeypatch):
    made, ids = model("ptq_int8"), tokens(2, 4)
    expected, _ = read(made, ids, "always")
    monkeypatch.setattr(engine, "_facts", lambda: (native.isa(), threading.get_ident()))
    found: list[Tensor] = []
    threads = [
        threading.Thread(
            target=lambda: found.extend(read(made, ids, "always")[0] for _ in range(10))
        )
        for _ in range(2)
    ]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert len(found) == 20
    assert all(torch.equal(x, expected) for x in found)
