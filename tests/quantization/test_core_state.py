"""State dicts of standalone cores: what does not fit is refused, and changes nothing."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bkcore import QuantizationConfig, QuantizedBirmanSchwingerCore
from bkcore.errors import CheckpointError

N = 10
FORMS = [("ptq_int4", "quantized"), ("qat_int8", "training"), ("qat_int8", "quantized")]


def build(mode: str, state: str, scale: float = 1.0, **options) -> QuantizedBirmanSchwingerCore:
    torch.manual_seed(0)
    core = QuantizedBirmanSchwingerCore(N, QuantizationConfig(mode, 4), **options)
    if state == "float":
        return core
    core.start_calibration()
    core(scale * torch.randn(8, N))
    core.end_calibration()
    if mode.startswith("ptq"):
        core.apply_ptq()
        return core
    core.enable_qat()
    if state == "quantized":
        core.convert()
    return core


def spoiled(value: Tensor) -> list[object]:
    """Entries that cannot stand where `value` does."""
    other = torch.float32 if value.dtype != torch.float32 else torch.int64
    return [
        value[None],
        value.new_zeros(value.numel() + 1),
        value.new_zeros(0),
        value.to(other),
        value.to(torch.complex64),
        value.tolist(),
        None,
        "7",
    ]


def assert_refused(core: nn.Module, entries: Any, **options) -> None:
    """It raises, and the core is what it was: as a module, and in what it computes."""
    before, form = copy.deepcopy(core.state_dict()), sorted(dict(core.named_parameters()))
    with pytest.raises(CheckpointError):
        core.load_state_dict(entries, **options)
    after = core.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in after)
    assert sorted(dict(core.named_parameters())) == form


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(("mode", "state"), FORMS)
def test_any_spoiled_entry_is_refused(mode, state, strict):
    good = build(mode, state).state_dict()
    core = build(mode, state, scale=3.0)
    for key, value in good.items():
        missing = {name: x for name, x in good.items() if name != key}
        assert_refused(core, missing, strict=strict)
        for entry in spoiled(value):
            assert_refused(core, {**good, key: entry}, strict=strict)
    assert_refused(core, {**good, "v_quantizer.scales": torch.ones(3)}, strict=strict)
    core.load_state_dict(good)
    v = torch.randn(3, N)
    assert torch.equal(core(v), build(mode, state)(v))


def test_a_fresh_core_keeps_its_form_when_it_refuses():
    """A converted core's entries turn learned scales into stored ones, but only all together."""
    good = build("qat_int8", "quantized").state_dict()
    for key in good:
        fresh = build("qat_int8", "float")
        with pytest.raises(CheckpointError):
            fresh.load_state_dict({**good, key: None})
        assert all(q.learnable for q in (fresh.v_quantizer, fresh.G_quantizer.imag))
        fresh.load_state_dict(good)
        assert not fresh.v_quantizer.learnable


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 0.0, -1.0])
def test_scales_of_a_calibrated_core_are_positive(bad):
    core = build("ptq_int4", "quantized")
    entries = core.state_dict()
    entries["G_quantizer.imag.stored_scales"] = torch.full((3,), bad, dtype=torch.bfloat16)
    assert_refused(build("ptq_int4", "quantized", 3.0), entries)
    fresh = build("ptq_int4", "float")
    fresh.load_state_dict(build("ptq_int4", "float").state_dict())  # here they are NaN
    assert not fresh.calibrated


def test_zero_points_of_a_symmetric_quantizer_are_zero():
    entries = build("ptq_int4", "quantized").state_dict()
    entries["G_quantizer.real.zero_points"] = torch.tensor([0, 1, 0], dtype=torch.int8)
    assert_refused(build("ptq_int4", "quantized"), entries)


def test_what_still_trains_does_not_load_into_what_is_converted():
    with pytest.raises(CheckpointError, match="load it into a new core"):
        build("qat_int8", "quantized").load_state_dict(build("qat_int8", "training").state_dict())


@pytest.mark.parametrize("entries", [None, 3, [1], "x", {}])
def test_a_state_dict_is_a_mapping_with_entries(entries):
    assert_refused(build("ptq_int4", "quantized"), entries)


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"7", b"null", b'{"state": 3}', b"[" * 100_000, b'{"state": "float"}']
)
def test_a_state_that_is_no_state_is_refused(content):
    core = build("ptq_int4", "quantized")
    extra = torch.tensor(list(content), dtype=torch.uint8)
    assert_refused(core, {**core.state_dict(), "_extra_state": extra})
    with pytest.raises(CheckpointError):
        core.set_extra_state(extra)


@pytest.mark.parametrize("extra", [None, 10**14, torch.tensor(10**14), torch.zeros(3)])
def test_an_extra_state_of_another_type_is_refused(extra):
    with pytest.raises(CheckpointError, match="uint8"):
        build("ptq_int4", "quantized").set_extra_state(extra)


def test_inside_a_larger_model():
    class Model(nn.Module):
        def __init__(self, core: nn.Module) -> None:
            super().__init__()
            self.front = nn.Linear(2, N)
            self.core = core

    good = Model(build("ptq_int4", "quantized")).state_dict()
    model = Model(build("ptq_int4", "float"))
    with pytest.raises(CheckpointError):
        model.load_state_dict({**good, "core.v_quantizer.record": torch.zeros(2)})
    assert not model.core.calibrated
    model.load_state_dict({k: x for k, x in good.items() if "core" not in k}, strict=False)
    assert not model.core.calibrated
    model.load_state_dict(good)
    v = torch.randn(2, N)
    assert torch.equal(model.core(v), build("ptq_int4", "quantized")(v))


def test_what_was_observed_before_is_forgotten():
    core = build("ptq_int4", "float")
    core.start_calibration()
    core(torch.randn(4, N))
    core.load_state_dict(build("ptq_int4", "quantized").state_dict())
    assert core.v_quantizer._histograms is None


def test_it_says_which_state_it_is():
    fields = json.loads(bytes(build("qat_int8", "training").get_extra_state().tolist()))
    assert fields["state"] == "training"
    assert fields["nonuniform"] is True
    assert (
        json.loads(bytes(build("ptq_int8", "quantized").get_extra_state().tolist()))["nonuniform"]
        is False
    )
