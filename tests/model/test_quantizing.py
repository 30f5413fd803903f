"""Calibration and quantization of the language model: its steps, its errors, its size."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bkcore.errors import CalibrationError, CheckpointError, InputError, LifecycleError
from bkcore.model import LanguageModel, conversion
from bkcore.quantization import QuantizationConfig, QuantizationState
from tests.model.helpers import expected_bits


def floats(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


# ---- steps ---------------------------------------------------------------------------------


def test_a_new_model_is_float(mode):
    model = LanguageModel(61, 16, 1, use_quantized_bk_core=True, quantization_mode=mode)
    assert model.quantization_state is QuantizationState.FLOAT
    assert model.quant_config == QuantizationConfig(mode)
    assert not model.calibrated
    assert model.config.quantization == {**QuantizationConfig(mode).to_dict(), "state": "float"}


def test_the_default_mode_is_ptq_int8():
    model = LanguageModel(61, 16, 1, use_quantized_bk_core=True)
    assert model.quant_config is not None
    assert model.quant_config.mode == "ptq_int8"


def test_a_config_may_stand_for_the_mode():
    config = QuantizationConfig("ptq_int4", group_size=8, symmetric=True)
    model = LanguageModel(61, 16, 1, use_quantized_bk_core=True, quantization_mode=config)
    assert model.quant_config == config


def test_a_mode_without_quantization_is_refused():
    with pytest.raises(InputError, match="needs use_quantized_bk_core=True"):
        LanguageModel(61, 16, 1, quantization_mode="ptq_int8")
    with pytest.raises(InputError, match="unknown quantization mode 'int8'"):
        LanguageModel(61, 16, 1, use_quantized_bk_core=True, quantization_mode="int8")
    with pytest.raises(InputError, match="unknown quantization mode 'int8'"):
        LanguageModel(61, 16, 1).configure_quantization("int8")


@pytest.mark.parametrize(
    "step",
    [
        "start_calibration",
        "apply_ptq",
        "enable_qat",
        "estimate_model_size",
        "calibrate_quantization",
    ],
)
def test_a_model_without_a_mode_has_no_steps(build, step):
    arguments: list[list[Tensor]] = [[]] if step == "calibrate_quantization" else []
    with pytest.raises(LifecycleError, match=rf"{step}\(\) needs a quantization mode"):
        getattr(build(), step)(*arguments)


def test_steps_out_of_order_name_the_missing_one(build, tokens, mode):
    model = build(mode)
    is_qat = mode.startswith("qat")
    finish = model.enable_qat if is_qat else model.apply_ptq
    with pytest.raises(LifecycleError, match=r"next step from here is start_calibration\(\)"):
        finish()
    model.start_calibration()
    with pytest.raises(LifecycleError, match=r"next step from here is end_calibration\(\)"):
        finish()
    with pytest.raises(LifecycleError, match=r"next step from here is end_calibration\(\)"):
        model.calibrate_quantization([tokens(1, 8)])
    with pytest.raises(LifecycleError, match=r"configure_quantization\(\) needs a model that is"):
        model.configure_quantization("ptq_int8")
    model(tokens(2, 8))
    model.end_calibration()
    with pytest.raises(LifecycleError, match="convert"):
        model.convert()
    wrong = model.apply_ptq if is_qat else model.enable_qat
    with pytest.raises(LifecycleError, match="is not a step of mode"):
        wrong()
    finish()
    finish()  # done already
    if is_qat:
        assert model.quantization_state is QuantizationState.TRAINING
        model.convert()
    assert model.quantization_state is QuantizationState.QUANTIZED
    with pytest.raises(LifecycleError, match="start from the float model"):
        model.start_calibration()
    with pytest.raises(LifecycleError, match="convert" if is_qat else "is not a step of mode"):
        model.convert()
    with pytest.raises(LifecycleError, match="start from the float model"):
        model.calibrate_quantization([tokens(1, 8)])


@torch.no_grad()
def test_until_it_is_quantized_its_logits_are_the_float_ones(build, tokens, mode):
    ids = tokens(2, 20)
    expected = build()(ids).logits
    model = build(mode)
    assert torch.equal(model(ids).logits, expected)
    model.start_calibration()
    assert torch.equal(model(ids).logits, expected)
    model.end_calibration()
    assert torch.equal(model(ids).logits, expected)
    model.enable_qat() if mode.startswith("qat") else model.apply_ptq()
    assert not torch.equal(model(ids).logits, expected)


@torch.no_grad()
def test_calibrating_with_tensors_with_dictionaries_and_by_hand_is_the_same(build, tokens, mode):
    batches = [tokens(3, 20), tokens(2, 7)]
    models = [build(mode) for _ in range(3)]
    models[0].calibrate_quantization(batches)
    models[1].calibrate_quantization({"input_ids": batch, "labels": batch} for batch in batches)
    models[2].start_calibration()
    for batch in batches:
        models[2](batch)
    models[2].end_calibration()
    models[2].enable_qat() if mode.startswith("qat") else models[2].apply_ptq()
    ids = tokens(2, 30)
    logits = [model(ids).logits for model in models]
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2])


@pytest.mark.parametrize("training", [True, False])
def test_calibration_keeps_the_training_flag_and_leaves_no_gradient(build, tokens, mode, training):
    model = build(mode).train(training)
    model.calibrate_quantization([tokens(2, 8)])
    assert all(module.training == training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("start", ["float", "calibrated"])
def test_calibration_without_data_leaves_the_model_as_it_was(build, tokens, mode, start):
    model = build(mode, start)
    before = floats(build(mode, start))
    with pytest.raises(CalibrationError, match="saw no data"):
        model.calibrate_quantization(iter(()))
    assert model.quantization_state == start
    assert model.config.quantization["state"] == start
    assert dict.fromkeys(before, True) == {
        name: torch.equal(value, before[name]) for name, value in floats(model).items()
    }
    model.calibrate_quantization([tokens(2, 8)])
    assert model.calibrated


def test_calibration_on_activations_that_are_not_finite(build, tokens, mode):
    model = build(mode)
    with torch.no_grad():
        model.layers[1].mixer.in_proj.weight[0, 0] = torch.nan
    with pytest.raises(CalibrationError, match="NaN"):
        model.calibrate_quantization([tokens(2, 8)])
    assert model.quantization_state is QuantizationState.FLOAT


def test_an_error_of_the_data_passes_and_leaves_a_float_model(build, tokens, mode):
    def broken():
        yield tokens(2, 8)
        raise OSError("the disk is gone")

    model = build(mode).train()
    with pytest.raises(OSError, match="the disk is gone"):
        model.calibrate_quantization(broken())
    assert model.quantization_state is QuantizationState.FLOAT
    assert model.training
    model.calibrate_quantization([tokens(2, 8)])


def test_memory_of_calibration_does_not_grow(build, tokens):
    model = build("ptq_int8", n_layers=1)

    def held() -> int:
        parts = conversion.core_quantizers(model)[0].parts()
        tensors = [tensor for part in parts for tensor in vars(part._histograms).values()]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    model.start_calibration()
    with torch.no_grad():
        model(tokens(1, 4))
        first = held()
        for _ in range(50):
            model(tokens(2, 9))
    assert held() == first


# ---- what comes of it ----------------------------------------------------------------------


@torch.no_grad()
def test_more_bits_are_nearer_to_the_float_model(build, tokens):
    ids = tokens(4, 32)
    exact = build()(ids).logits
    errors = {}
    for mode in ("ptq_int8", "mixed_precision", "ptq_int4"):
        logits = build(mode, "quantized")(ids).logits
        noise = (logits - exact).square().mean(-1) / exact.square().mean(-1)
        # The median: with random weights, a token routed to another expert is wholly different.
        errors[mode] = noise.median().item()
    # Steps sixteen times longer have 256 times the noise, until the noise saturates.
    assert errors["ptq_int8"] < 0.1 * errors["ptq_int4"]
    # INT8 and mixed precision have no order: one has a head of float16, the other better experts.
    assert errors["mixed_precision"] < errors["ptq_int4"]
    assert errors["ptq_int8"] < 0.02


@torch.no_grad()
def test_nan_is_not_hidden(build, tokens, executed_form):
    model = build(*executed_form)
    model.layers[0].mixer_norm.weight[3] = torch.nan
    assert model(tokens(1, 9)).logits.isnan().all()


def test_size_at_every_state(build, quantizing_form):
    mode, state = quantizing_form
    model = build(mode, state)
    size = model.estimate_model_size()
    held = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    assert size["current_bytes"] == held
    plain = build()
    assert size["fp32_bytes"] == 4 * sum(p.numel() for p in plain.parameters())
    done = build(mode, "quantized")
    expected = sum(t.numel() * t.element_size() for t in done.state_dict().values())
    assert size["quantized_bytes"] == expected
    assert size["compression_ratio"] == size["fp32_bytes"] / expected
    assert size["bits"] == expected_bits(mode, "core")


def test_a_state_dict_of_another_state_is_refused(build):
    quantized, plain = build("ptq_int8", "quantized"), build()
    for source, target in ((quantized, plain), (plain, quantized)):
        with pytest.raises(CheckpointError, match="another quantization state"):
            target.load_state_dict(source.state_dict())
    plain.load_state_dict(build().state_dict())


def test_one_tensor_is_no_list_of_batches(build, tokens):
    model = build("ptq_int8")
    with pytest.raises(InputError, match=r"give \[ids\]"):
        model.calibrate_quantization(tokens(4, 10))
    assert model.quantization_state.value == "float"
