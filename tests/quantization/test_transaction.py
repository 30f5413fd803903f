"""A step that fails, wherever it fails, leaves what it worked on as it was."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bkcore.errors import CalibrationError
from bkcore.quantization import (
    ComplexQuantizer,
    GroupWiseQuantizer,
    QuantizationConfig,
    QuantizedBirmanSchwingerCore,
)
from bkcore.quantization.observers import HistogramObserver
from bkcore.quantization.transaction import all_or_nothing
from tests.slow import combinations

N = 6
STEPS = {
    "start_calibration": "float",
    "observe": "calibrating",
    "end_calibration": "observed",
    "apply_ptq": "calibrated",
    "enable_qat": "calibrated",
    "convert": "training",
}
"""Each step, and where a core stands before it."""


class Injected(BaseException):
    """Raised inside a step by these tests; not an `Exception`, as little as Ctrl-C is one."""


@contextmanager
def failing_at(call: int) -> Iterator[list[str]]:
    """Raise at one of the calls of the library's functions in the block; list those before it."""
    seen: list[str] = []

    def on_event(frame, event, _) -> None:
        file = frame.f_code.co_filename
        if event != "call" or "/bkcore/" not in file or file.endswith("transaction.py"):
            return
        seen.append(frame.f_code.co_name)
        if len(seen) == call + 1:
            raise Injected

    before = sys.getprofile()
    sys.setprofile(on_event)
    try:
        yield seen
    finally:
        sys.setprofile(before)


def prepared(step: str, mode: str, *, again: bool = False) -> QuantizedBirmanSchwingerCore:
    """A core on which the step comes next; `again` lets it have been calibrated before."""
    torch.manual_seed(0)
    core = QuantizedBirmanSchwingerCore(N, QuantizationConfig(mode, group_size=5))
    place = STEPS[step]
    for _ in range(1 + again):
        if place == "float":
            break
        core.start_calibration()
        core(torch.randn(4, N))
        if place in ("calibrated", "training") or again:
            core.end_calibration()
    if again and place in ("calibrating", "observed"):
        core.start_calibration()
        core(torch.randn(4, N))
    if place == "training":
        core.enable_qat()
    return core


def run(step: str, core: QuantizedBirmanSchwingerCore) -> None:
    if step == "observe":
        core(torch.arange(2.0 * N).reshape(2, N).sin())
    else:
        getattr(core, step)()


def contents(module: nn.Module) -> list[object]:
    """Everything about the modules: which objects they hold, and the bits of every tensor."""
    found: list[object] = []
    for part in module.modules():
        held = {**vars(part), **part._parameters, **part._buffers}
        for name, value in held.items():
            found.append((id(part), name, id(value)))
            found.append(repr(value) if isinstance(value, str | dict | deque) else None)
            inner = vars(value).values() if isinstance(value, HistogramObserver) else (value,)
            found += [x.detach().numpy().tobytes() for x in map(plain, inner) if x is not None]
    return found


def plain(x: object) -> Tensor | None:
    return x.float() if isinstance(x, Tensor) else None


def same_state(one: nn.Module, other: nn.Module) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(
        torch.equal(a[key].float().nan_to_num(7), b[key].float().nan_to_num(7)) for key in a
    )


@pytest.mark.parametrize("again", combinations([False, True], quick=[False]))
@pytest.mark.parametrize("mode", ["ptq_int4", "qat_int8"])
@pytest.mark.parametrize("step", STEPS)
def test_a_step_that_fails_anywhere_leaves_the_core_as_it_was(step, mode, again):
    is_qat = mode.startswith("qat")
    if (step in ("enable_qat", "convert") and not is_qat) or (step == "apply_ptq" and is_qat):
        pytest.skip("no step of this mode")
    done = prepared(step, mode, again=again)
    with failing_at(10**9) as calls:
        run(step, done)
    assert calls
    for call in range(0, len(calls), max(1, len(calls) // 8)):
        core = prepared(step, mode, again=again)
        before = contents(core)
        with pytest.raises(Injected), failing_at(call):
            run(step, core)
        assert contents(core) == before, calls[call]
        run(step, core)  # it is usable for another try, which gives what an undisturbed one does
        assert core.quantization_state is done.quantization_state
        assert same_state(core, done)
        if step == "observe":
            core.end_calibration()
            untouched = prepared(step, mode, again=again)
            run(step, untouched)
            untouched.end_calibration()
            assert same_state(core, untouched)


def test_a_batch_whose_features_cannot_be_counted_counts_nowhere(monkeypatch):
    core, clean = (prepared("end_calibration", "ptq_int8") for _ in range(2))

    def refuse(*_) -> None:
        raise CalibrationError("no")

    monkeypatch.setattr(core.G_quantizer.imag, "observe", refuse)
    with pytest.raises(CalibrationError):
        core(100 * torch.randn(4, N))
    monkeypatch.undo()
    for one in (core, clean):
        one.end_calibration()
    assert same_state(core, clean)


def quantizers() -> list[Callable[[], GroupWiseQuantizer | ComplexQuantizer]]:
    return [
        lambda: GroupWiseQuantizer(N, 5),
        lambda: GroupWiseQuantizer(N, 5, learnable=True, nonuniform=True),
        lambda: ComplexQuantizer(N, group_size=5, nonuniform=True),
    ]


@pytest.mark.parametrize("build", quantizers())
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_quantizer_that_cannot_be_calibrated_keeps_its_scales(build, bad):
    quantizer = build()
    x = torch.randn(4, N)
    x = torch.complex(x, x.flip(0)) if isinstance(quantizer, ComplexQuantizer) else x
    quantizer.calibrate(x)
    quantizer.start_calibration()
    quantizer.observe(x)
    before = contents(quantizer)
    for spoiled in (torch.where(x == x[1, 2], bad, x), x[:0]):
        with pytest.raises(CalibrationError):
            quantizer.calibrate(spoiled)
        assert contents(quantizer) == before
    if isinstance(quantizer, ComplexQuantizer):
        half_bad = torch.complex(x.real, torch.full_like(x.imag, bad))
        with pytest.raises(CalibrationError):
            quantizer.observe(half_bad)
        assert contents(quantizer) == before
    quantizer.end_calibration()


def test_hooks_modules_and_containers_come_back_in_place():
    model: Any = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)).train()
    model.history = deque([1])
    held, modules = model.history, model._modules
    weight, first = model[0].weight, model[0]
    calls = []
    hook = model[0].register_forward_pre_hook(lambda *_: calls.append("first"))

    def change() -> None:
        model[0] = nn.Identity()
        first.register_forward_pre_hook(lambda *_: calls.append("second"))
        del first.weight
        model.history.append(2)
        model.extra = 3
        model.eval()
        raise Injected

    with pytest.raises(Injected), all_or_nothing(model):
        change()
    assert model.history is held
    assert list(held) == [1]
    assert model._modules is modules
    assert model[0] is first
    assert first.weight is weight
    assert not hasattr(model, "extra")
    assert model.training
    model(torch.zeros(1, 2))
    assert calls == ["first"]
    hook.remove()
    model(torch.zeros(1, 2))
    assert calls == ["first"]


def test_a_block_that_succeeds_changes_what_it_says():
    model: Any = nn.Linear(2, 2)
    with all_or_nothing(model):
        model.extra = 1
    assert model.extra == 1
