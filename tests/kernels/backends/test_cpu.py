"""The extension refuses memory that is shorter than what it is to read or write."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode

from bkcore import kernels
from bkcore.errors import ShapeError
from bkcore.kernels.backends.cpu import attention, native
from bkcore.kernels.backends.interface import ATTENTION_CHUNK
from tests.kernels.operators import EVERY, Arguments, arguments, call


class Recorder:
    """The extension, keeping the arguments of every call that hands memory over."""

    def __init__(self, native: Any) -> None:
        self.native = native
        self.calls: list[tuple[str, Arguments]] = []

    def __getattr__(self, name: str) -> Any:
        function = getattr(self.native, name)
        if not callable(function) or name in ("supported_isas", "few_and_long"):
            return function

        def recorded(args: Arguments) -> Any:
            self.calls.append((name, args))
            return function(args)

        return recorded


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder(native._native)
    monkeypatch.setattr(native, "_native", recorder)
    return recorder


def calls_of_everything(recorder: Recorder) -> list[tuple[str, Arguments]]:
    keep = []  # as long as what they point to
    for name in EVERY:
        variants: list[dict[str, Any]] = [{}]
        args = arguments(name)
        if "bits" in args:
            variants = [{"bits": 4}, {"bits": 8}]
        elif "two_sided" in args:
            variants = [{"two_sided": False}, {"two_sided": True}]
        for sizes in variants:
            args = arguments(name, **sizes)
            keep.append((args, call(name, args)))
    return recorder.calls


def is_buffer(x: Any) -> bool:
    return isinstance(x, tuple) and len(x) == 2 and all(isinstance(n, int) for n in x) and x[0] > 99


def is_layout(x: Any) -> bool:
    return isinstance(x, tuple) and [type(n) for n in x] == [int, int, tuple, tuple] and x[0] > 0


def worse(x: Any) -> Iterator[Any]:
    """The same arguments, each time with less memory behind one of them, or one more or fewer."""
    if is_buffer(x):
        address, bytes_ = x
        yield from ((address, bytes_ - 1), (address, bytes_ // 2), (address, 0), (0, bytes_))
        yield (address, 2 * bytes_)  # numbers of another width
    elif is_layout(x):
        address, width, sizes, strides = x
        yield from ((0, width, sizes, strides), (address, 2, sizes, strides))
        for axis, size in enumerate(sizes):
            yield (address, width, (*sizes[:axis], size - 1, *sizes[axis + 1 :]), strides)
    elif isinstance(x, list):
        for index, item in enumerate(x):
            for other in worse(item):
                yield [*x[:index], other, *x[index + 1 :]]
    elif isinstance(x, dict):
        for name, item in x.items():
            for other in worse(item):
                yield {**x, name: other}
        yield {**x, "nothing": 1}
        for name in x:
            yield {known: item for known, item in x.items() if known != name}


def test_less_memory_than_a_kernel_needs_is_refused(recorder):
    calls = calls_of_everything(recorder)
    known = {name for name in dir(native._native.native) if not name.startswith("__")}
    plain = {"supported_isas", "few_and_long", "openmp", "rows_per_share"}
    assert {name for name, _ in calls} == known - plain
    for name, args in calls:
        function: Callable[..., Any] = getattr(recorder.native, name)
        tried = 0
        for other in worse(args):
            with pytest.raises(ValueError, match=r"^bkcore\.kernels\.backends\.cpu\._native: "):
                function(other)
            tried += 1
        assert tried >= 8, name


def test_the_sites_between_two_states_are_those_that_memory_was_made_for(monkeypatch):
    args = arguments("torch.ops.attention_backward", sites=2 * ATTENTION_CHUNK)
    call("torch.ops.attention_backward", args)
    monkeypatch.setattr(attention, "ATTENTION_CHUNK", ATTENTION_CHUNK // 2)
    with pytest.raises(ValueError, match=r"checkpoints has .* bytes instead of"):
        call("torch.ops.attention_backward", args)


def test_states_that_were_not_kept_are_missed():
    leaves = arguments("torch.ops.attention")
    leaves["v"].requires_grad_()
    out = torch.ops.bkcore.attention.default(**{**leaves, "keep": False})[1]
    with pytest.raises(ShapeError, match=r"checkpoints must be .* with keep=True"):
        out.sum().backward()


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
def test_a_fake_tensor_has_no_memory():
    real = arguments("sweep_step")
    with FakeTensorMode(), torch.no_grad():
        args = {k: torch.empty(x.shape) for k, x in real.items()}
        with pytest.raises(ValueError, match="fake tensor"):
            kernels.sweep_step(**args)
