"""The QAT modes of `bkcore quantize`, and the control."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from bkcore.cli import app
from bkcore.commands.quantize_steps import run_quantize
from bkcore.errors import DivergenceError
from bkcore.evaluation.checkpoints import load_checkpoint
from bkcore.quantization.receipt_file import read
from bkcore.text import TokenWindows, encode, spread
from bkcore.training import train
from tests.commands.quantizing import QUIET, TRAIN, settings


def test_training_in_a_qat_mode(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    options = settings(mode="qat_int8", steps=2, learning_rate=1e-3, strict=True)
    found = run_quantize(checkpoint, tmp_path, text, options, QUIET)
    assert settings(mode="qat_int8", steps=2).schedule(32).learning_rate == 1e-4
    model, _ = load_checkpoint(tmp_path)
    assert model.quantization_state == "quantized"
    assert {entry["range_method"] for entry in found["receipt"]["weights"]} == {"learned"}
    training = read(tmp_path)["training"]
    first, last = training.pop("first_loss"), training.pop("last_loss")
    assert training == {
        "steps": 2,
        "windows": 4096 // 32,
        "batch_size": 4096 // 32,
        "window": 32,
        "learning_rate": 1e-3,
        "distilled": True,
    }
    printed = CliRunner().invoke(app, ["receipt", str(tmp_path)], catch_exceptions=False).output
    line = "Trained 2 steps towards what the float model predicts, divergence "
    assert f"{line}{first:.4f} -> {last:.4f} nats a token\n" in printed
    ptq = run_quantize(checkpoint, tmp_path / "ptq", text, settings(mode="ptq_int8"), QUIET)
    assert (tmp_path / "model.safetensors").stat().st_size > 0
    assert ptq["receipt"]["weights"] != found["receipt"]["weights"]


@pytest.mark.parametrize("distill", [None, True, False])
def test_a_qat_mode_imitates_the_float_model_or_learns_the_text(
    checkpoint: Path, text: Path, tmp_path: Path, distill: bool | None
) -> None:
    how = settings(mode="qat_int8", steps=3, learning_rate=0.01, distill=distill)
    run_quantize(checkpoint, tmp_path, text, how, QUIET)
    found, tokenizer = load_checkpoint(tmp_path)
    expected, _ = load_checkpoint(checkpoint)
    teacher = None if distill is False else load_checkpoint(checkpoint)[0]
    windows = TokenWindows(encode(tokenizer, TRAIN), 32)
    expected.configure_quantization(how.config)
    picks = spread(windows, how.calibration_tokens // 32)
    expected.calibrate_quantization(picks.split(4096 // 32))
    if teacher is not None:  # as many as a batch, more than a tenth of what three steps read
        few = spread(windows, 4096 // 32)
        assert len(few) < len(windows)
        windows = TokenWindows(few.flatten(), 32)
    train(expected, windows, how.schedule(32), teacher=teacher)
    expected.convert()
    for name, tensor in expected.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor), name


def test_what_diverges_replaces_nothing(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    run_quantize(checkpoint, tmp_path, text, settings(mode="ptq_int8"), QUIET)
    before = (tmp_path / "model.safetensors").read_bytes()
    for distill in (True, False):
        how = settings(mode="qat_int8", steps=3, learning_rate=1e20, distill=distill)
        with pytest.raises(DivergenceError, match="a peak of 1e\\+20"):
            run_quantize(checkpoint, tmp_path, text, how, QUIET)
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_the_control_trains_in_float_for_the_same_steps(
    checkpoint: Path, text: Path, tmp_path: Path
) -> None:
    how = settings(mode="qat_int8", steps=3, learning_rate=0.01)
    run_quantize(checkpoint, tmp_path / "int8", text, how, QUIET, tmp_path / "control")
    control, tokenizer = load_checkpoint(tmp_path / "control")
    assert control.quantization_state == "float"
    expected, _ = load_checkpoint(checkpoint)
    windows = TokenWindows(encode(tokenizer, TRAIN), 32)
    train(expected, windows, how.schedule(32))
    for name, tensor in expected.state_dict().items():
        assert torch.equal(control.state_dict()[name], tensor), name
    quantized, _ = load_checkpoint(tmp_path / "int8")
    assert quantized.quantization_state == "quantized"
