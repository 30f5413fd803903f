"""What calibration of the language model gathers: in one process, in two, and what is kept."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from bkcore.errors import CalibrationError
from bkcore.model import ResNetBKForCausalLM, conversion
from bkcore.quantization import QuantizationConfig
from bkcore.quantization.gptq import InputMoments
from bkcore.quantization.weights import PackedWeight, pack_weight

SCRIPT = Path(__file__).with_name("two_processes.py")
ALONE = runpy.run_path(str(SCRIPT))
MODES = ALONE["MODES"]


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("processes")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*launcher, "--nproc_per_node", "2", str(SCRIPT), str(folder)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("name", [*(f"{mode}-halves" for mode in MODES), f"{MODES[0]}-first"])
def test_two_processes_calibrate_as_one(two_processes: Path, name: str, rank: int) -> None:
    expected = ALONE["build"](name.split("-")[0])
    expected.calibrate_quantization(ALONE["batches"]())
    found = load_file(two_processes / f"{name}-{rank}")
    assert found.keys() == expected.state_dict().keys()
    for key, tensor in expected.state_dict().items():
        assert torch.equal(found[key], tensor), key


def packed(model: ResNetBKForCausalLM) -> dict[str, PackedWeight]:
    return {n: m for n, m in model.named_modules() if isinstance(m, PackedWeight)}


def compensated(mode: str) -> set[str]:
    """Parts of the names of the weights that GPTQ rounds in a mode."""
    return {"ptq_int4": {"mixer", "experts"}, "mixed_precision": {"experts"}}.get(mode, set())


def test_moments_live_from_calibration_to_quantization(build, tokens, mode):
    model = build(mode)
    assert not conversion.input_moments(model)
    calibrated = build(mode, "calibrated")
    layers = {n for n, m in calibrated.named_modules() if isinstance(m, InputMoments)}
    count = {"mixer": 2 * 2, "experts": 2 * 4 * 2}
    assert len(layers) == sum(count[part] for part in compensated(mode))
    before = [moments.tokens.clone() for moments in conversion.input_moments(calibrated)]
    calibrated(tokens(2, 9))
    after = [moments.tokens for moments in conversion.input_moments(calibrated)]
    assert before == after  # nothing is watched any longer
    assert not conversion.input_moments(build(mode, "quantized"))


def test_every_weight_knows_how_many_tokens_shaped_it(build, tokens, mode, tmp_path):
    model = build(mode)
    model.calibrate_quantization([tokens(2, 20), tokens(1, 7)])
    model.save_pretrained(tmp_path)
    seen = {name: weight.tokens_seen for name, weight in packed(model).items()}
    for name, count in seen.items():
        if "embedding" in name or not any(part in name for part in compensated(mode)):
            assert count == 0, name
        elif "mixer" in name:
            assert count == 47, name
    for layer in range(2):
        for linear in ("up", "down"):
            names = [n for n in seen if n.startswith(f"layers.{layer}.experts") and linear in n]
            routed = 2 * 47 if "experts" in compensated(mode) else 0
            assert sum(seen[name] for name in names) == routed
    if not packed(model):  # it is going to train first
        return
    receipt = ResNetBKForCausalLM.from_pretrained(tmp_path).receipt
    shaped = {e["name"] for e in receipt["weights"] if e.get("rounding") == "gptq"}
    assert shaped == {name.removesuffix(".weight") for name, count in seen.items() if count}


@torch.no_grad()
@pytest.mark.parametrize("mode", ["ptq_int4", "mixed_precision"])
@pytest.mark.parametrize("rounding", ["gptq", "nearest"])
def test_outputs_on_the_calibration_data_change_less_than_by_plain_rounding(
    build, tokens, mode, rounding
):
    model = build()
    model.configure_quantization(QuantizationConfig(mode, 16, weight_rounding=rounding, min_size=0))
    inputs: dict[str, list[Tensor]] = {}
    hooks = []
    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear):
            seen = inputs.setdefault(name, [])
            hooks.append(layer.register_forward_pre_hook(lambda _, x, seen=seen: seen.append(x[0])))
    floats = {name: layer.weight.clone() for name, layer in model.named_modules() if name in inputs}
    ids = tokens(4, 32)
    model(ids)
    for hook in hooks:
        hook.remove()
    model.calibrate_quantization([ids])
    checked = 0
    for name, weight in packed(model).items():
        layer = name.removesuffix(".weight")
        if weight.bits == 8 or layer not in floats:
            continue
        x, wanted = torch.cat([part.flatten(0, -2) for part in inputs[layer]]), floats[layer]
        plain = pack_weight(wanted, 4, weight.group_size)
        if rounding == "nearest":
            assert torch.equal(weight.packed, plain.packed)
            assert torch.equal(weight.stored_scales, plain.stored_scales)
        else:
            rows = torch.arange(len(wanted))
            error, before = (
                (x @ (wanted - each.rows(rows)).t()).square().sum() for each in (weight, plain)
            )
            assert error < before, name
        checked += 1
    assert checked == (20 if mode == "ptq_int4" else 16)


def test_a_calibration_that_fails_leaves_no_moments(build, tokens):
    model = build("ptq_int4")
    with pytest.raises(CalibrationError, match="saw no data"):
        model.calibrate_quantization([])
    assert not conversion.input_moments(model)
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("observer", ["minmax", "percentile", "mae", "mse", "auto"])
def test_the_observer_rules_every_quantizer_and_is_remembered(build, tokens, observer, tmp_path):
    model = build()
    model.configure_quantization(QuantizationConfig("ptq_int8", observer=observer, min_size=0))
    model.calibrate_quantization([tokens(2, 20), tokens(1, 7)])
    model.save_pretrained(tmp_path)
    for one in (model, ResNetBKForCausalLM.from_pretrained(tmp_path)):
        for quantizers in conversion.core_quantizers(one):
            for quantizer in quantizers.parts():
                if observer != "auto":
                    assert quantizer.method == observer
                assert quantizer.method in ("minmax", "percentile", "mae", "mse")
                assert quantizer.values_seen == 47 * quantizer.num_channels
                assert 0 <= quantizer.clipped_share < 0.1
                # An asymmetric zero point is rounded, and may cost a step at one end.
                if observer == "minmax" and quantizer.symmetric:
                    assert quantizer.clipped_share == 0
