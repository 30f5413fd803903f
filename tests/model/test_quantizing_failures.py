"""A step of quantization that fails, wherever it fails, leaves the model as it was."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bkcore.errors import CalibrationError
from bkcore.model import ResNetBKForCausalLM, conversion
from bkcore.quantization import QuantizationConfig

IDS = torch.randint(61, (2, 9), generator=torch.Generator().manual_seed(3))

BITS = {"layers.0.mixer.in_proj": 8}

Step = Callable[[ResNetBKForCausalLM], Any]

STEPS: dict[str, tuple[str | None, str, Step]] = {
    "configure": (None, "float", lambda m: m.configure_quantization("ptq_int8")),
    "assign": ("ptq_int4", "float", lambda m: m.assign_bits(BITS)),
    "assign later": ("ptq_int4", "calibrated", lambda m: m.assign_bits(BITS)),
    "start": ("ptq_int4", "float", lambda m: m.start_calibration()),
    "start again": ("ptq_int4", "calibrated", lambda m: m.start_calibration()),
    "observe": ("ptq_int4", "calibrating", lambda m: m(IDS)),
    "end": ("mixed_precision", "calibrating", lambda m: m.end_calibration()),
    "apply_ptq": ("mixed_precision", "calibrated", lambda m: m.apply_ptq()),
    "enable_qat": ("qat_int4", "calibrated", lambda m: m.enable_qat()),
    "convert": ("qat_int4", "training", lambda m: m.convert()),
    "all of PTQ": ("ptq_int4", "float", lambda m: m.calibrate_quantization([IDS, IDS])),
    "all of PTQ again": ("ptq_int8", "calibrated", lambda m: m.calibrate_quantization([IDS])),
    "all of QAT": ("qat_int8", "float", lambda m: m.calibrate_quantization([IDS])),
}
"""Each step, with the mode and the state of the model before it."""


class Injected(BaseException):
    """Raised inside of a step; not an `Exception`, as little as Ctrl-C is one."""


@contextmanager
def failing_at(call: int) -> Iterator[list[str]]:
    """Raise at one of the calls of the library's functions in the block; list those before it."""
    seen: list[str] = []

    def on_event(frame: Any, event: str, _: Any) -> None:
        file = frame.f_code.co_filename
        if event != "call" or "/bkcore/" not in file or file.endswith("transaction.py"):
            return
        if frame.f_code.co_name == "<genexpr>":  # what raises while it is closed is not seen
            return
        seen.append(f"{frame.f_code.co_name} of {file.rpartition('/')[2]}")
        if len(seen) == call + 1:
            raise Injected

    before = sys.getprofile()
    sys.setprofile(on_event)
    try:
        yield seen
    finally:
        sys.setprofile(before)


def contents(model: Any) -> list[object]:
    """Which objects the modules hold, the values of all tensors, and what the model is told."""
    found: list[object] = [copy.deepcopy(model.config.quantization), copy.deepcopy(model.receipt)]
    found += [model.quantization_state, model.quant_config]
    for module in model.modules():
        found += [id(module), sorted(vars(module)), module.training]
        found += [list(module._forward_pre_hooks), list(module._modules)]
        for x in [*vars(module).values(), *module._parameters.values(), *module._buffers.values()]:
            if isinstance(x, Tensor):
                found += [id(x), x.dtype, x.detach().double().numpy().tobytes()]
            elif isinstance(x, bool | int | str | float):
                found.append(x)
    for quantizers in conversion.core_quantizers(model):
        observers = [part._histograms for part in quantizers.parts()]
        found += [[x.tolist() for x in vars(o).values()] for o in observers if o is not None]
    found += [[x.tolist() for x in each._waiting] for each in conversion.input_moments(model)]
    return found


def prepared(build: Any, step: str) -> ResNetBKForCausalLM:
    mode, state, _ = STEPS[step]
    if state != "calibrating":
        return build(mode, state).train()
    model = build(mode).train()
    model.start_calibration()
    model(IDS.flip(0))
    return model


def same_tensors(one: nn.Module, other: nn.Module) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(
        torch.equal(a[key].double().nan_to_num(7), b[key].double().nan_to_num(7)) for key in a
    )


@pytest.mark.parametrize("step", STEPS)
def test_a_step_that_fails_anywhere_leaves_the_model_as_it_was(build, step):
    run = STEPS[step][2]
    done = prepared(build, step)
    with failing_at(10**9) as calls:
        run(done)
    kinds: dict[str, int] = {}
    for number, call in enumerate(calls):
        kinds[call] = number  # the last call of each function, when the most has been done
    tried = sorted(kinds.values())
    for number in tried[:: max(1, len(tried) // 5)] + tried[-1:]:
        model = prepared(build, step)
        before = contents(model)
        with pytest.raises(Injected), failing_at(number):
            run(model)
        assert contents(model) == before, calls[number]
    run(model)  # another try does what an undisturbed one does
    assert model.quantization_state is done.quantization_state
    assert model.config.quantization == done.config.quantization
    assert model.receipt == done.receipt
    assert same_tensors(model, done)


@pytest.mark.parametrize("mode", ["ptq_int8", "ptq_int4", "mixed_precision", "qat_int8"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_one_bad_weight_changes_nothing(build, tmp_path, mode, value):
    """Of the last layer that is packed: it meets no activation, or only that of an idle expert."""
    model = build()
    model.configure_quantization(QuantizationConfig(mode, 16, min_size=0))
    weight = list(conversion.quantizable(model))[-1].layer.weight
    kept = weight.detach().clone()
    with torch.no_grad():
        weight[3, 2] = value
    before = contents(model)
    with pytest.raises(CalibrationError):
        model.calibrate_quantization([IDS])
    assert contents(model) == before
    with torch.no_grad():
        weight.copy_(kept)
    model.save_pretrained(tmp_path)
    again = ResNetBKForCausalLM.from_pretrained(tmp_path).eval()
    for one in (model, again):
        one.calibrate_quantization([IDS])
    assert torch.equal(model.eval()(IDS).logits, again(IDS).logits)


def test_a_small_layer_beyond_float16_changes_nothing(build, tokens):
    model = build()
    model.configure_quantization(QuantizationConfig("ptq_int8", min_size=2048))
    with torch.no_grad():
        model.layers[1].experts.experts[3].down.weight[0, 0] = 1e5
    before = contents(model)
    with pytest.raises(CalibrationError, match="exceeds float16's range"):
        model.calibrate_quantization([IDS])
    assert contents(model) == before
    model.start_calibration()
    model(IDS)
    model.end_calibration()
    before = contents(model)
    with pytest.raises(CalibrationError, match="exceeds float16's range"):
        model.apply_ptq()
    assert contents(model) == before
    with torch.no_grad():
        model.layers[1].experts.experts[3].down.weight[0, 0] = 0.1
    model.apply_ptq()


def test_a_batch_that_fails_in_the_middle_is_not_counted(build):
    """Not in the layers before either."""
    models = [build("ptq_int4"), build("ptq_int4")]
    for model in models:
        model.start_calibration()
        model(IDS)
    norm = models[0].layers[1].mixer_norm.weight
    kept = norm.detach().clone()
    norm.data[0] = torch.nan
    with pytest.raises(CalibrationError, match="NaN"):
        models[0](IDS.flip(1))
    norm.data.copy_(kept)
    for model in models:
        model.end_calibration()
        model.apply_ptq()
    assert same_tensors(*models)
    assert models[0].receipt == models[1].receipt
