"""The steps of `bkcore quantize`: modes, bit budgets, texts, and what --strict refuses."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from bkcore.cli import app
from bkcore.commands import quantize_steps
from bkcore.commands.quantize_settings import QuantizeSettings
from bkcore.commands.quantize_steps import run_quantize
from bkcore.errors import DataError, InputError, ReceiptError
from bkcore.evaluation import evaluate
from bkcore.evaluation.calibration import CalibrationWindows
from bkcore.evaluation.checkpoints import load_checkpoint, save_checkpoint
from bkcore.evaluation.samples import samples_of
from bkcore.quantization.budget import average_bits
from bkcore.quantization.receipt_file import read
from bkcore.text import TokenWindows, encode, load_corpus, origin_of
from tests.commands.quantizing import QUIET, TRAIN, VALID, settings


def test_small_weights_are_refused_by_strict_and_can_be_forced(
    checkpoint: Path, text: Path, tmp_path: Path
) -> None:
    how = {"mode": "ptq_int8", "min_size": None}
    with pytest.raises(ReceiptError, match=r"down stayed float16 .*--min-size 0"):
        run_quantize(checkpoint, tmp_path, text, settings(**how, strict=True), QUIET)
    run_quantize(checkpoint, tmp_path, text, settings(**how), QUIET)
    output = CliRunner().invoke(app, ["receipt", str(tmp_path)], catch_exceptions=False).output
    assert "small: in float16, fewer than 2,048 numbers" in output
    for options in ({"mode": "qat_int8", "steps": 1}, {"mode": "mixed_precision"}):
        budget = {"target_bits": 5.0} if "steps" not in options else {}
        with pytest.raises(InputError, match="take no --min-size"):
            settings(**options, **budget, min_size=4)


def test_the_saved_model_is_the_one_of_the_python_interface(
    checkpoint: Path, text: Path, tmp_path: Path
) -> None:
    found = run_quantize(checkpoint, tmp_path, text, settings(mode="ptq_int4", strict=True), QUIET)
    model, tokenizer = load_checkpoint(tmp_path)
    assert model.quant_config is not None
    assert model.quant_config.mode == "ptq_int4"
    assert model.quant_config.group_size == 8
    assert model.receipt == read(tmp_path) == found["receipt"]
    ids = encode(tokenizer, VALID)[None, :40].long()
    reference, _ = load_checkpoint(checkpoint)
    assert not torch.equal(model(ids).logits, reference(ids).logits)


def test_it_calibrates_on_the_training_text_alone(
    checkpoint: Path, text: Path, tmp_path: Path
) -> None:
    other = tmp_path / "text"
    other.mkdir()
    (other / "train.txt").write_text(TRAIN)
    (other / "valid.txt").write_text("something else entirely . " * 200)
    tensors = []
    for data, name in ((text, "one"), (other, "two")):
        run_quantize(
            checkpoint,
            tmp_path / name,
            data,
            settings(mode="mixed_precision", target_bits=7.0),
            QUIET,
        )
        tensors.append((tmp_path / name / "model.safetensors").read_bytes())
    assert tensors[0] == tensors[1]


@pytest.mark.parametrize("bits", [7.0, 9.5])
def test_a_budget_of_bits_is_kept_and_loads_by_itself(
    checkpoint: Path, text: Path, tmp_path: Path, bits: float
) -> None:
    options = settings(mode="mixed_precision", target_bits=bits, strict=True)
    found = run_quantize(checkpoint, tmp_path, text, options, QUIET)
    model, _ = load_checkpoint(tmp_path)
    assert average_bits(found["receipt"]) <= bits
    given = {entry["name"]: entry["bits"] for entry in found["receipt"]["weights"]}
    assert model.quant_config is not None
    assert given == model.quant_config.tensor_bits
    assert len(set(given.values())) > 1
    # What is nearly deaf never gets more than what is not.
    choice = {unit: given.bits for unit, given in found["assignment"].items()}
    assert choice["layers.0.experts.experts.1"] <= choice["layers.0.experts.experts.0"]


def test_an_increase_that_cannot_be_had_is_refused(
    checkpoint: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = settings(mode="mixed_precision", max_increase=1e-9)
    with pytest.raises(InputError, match="allow more than 1e-09"):
        run_quantize(checkpoint, tmp_path / "out", text, options, QUIET)
    monkeypatch.setattr(quantize_steps, "measure", None)  # too few bits are seen before it
    options = settings(mode="mixed_precision", target_bits=4.0)
    with pytest.raises(InputError, match="allow more bits"):
        run_quantize(checkpoint, tmp_path / "out", text, options, QUIET)


def test_strict_names_what_is_amiss_and_writes_nothing(
    one_sided: Path, text: Path, tmp_path: Path
) -> None:
    with pytest.raises(ReceiptError, match=r"no calibration data reached .*experts\.1\.up"):
        run_quantize(one_sided, tmp_path / "out", text, settings(strict=True), QUIET)
    assert not (tmp_path / "out").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "note").write_text("mine")
    with pytest.raises(ReceiptError):
        run_quantize(one_sided, tmp_path / "mine", text, settings(strict=True), QUIET)
    assert (tmp_path / "mine" / "note").read_text() == "mine"
    run_quantize(one_sided, tmp_path / "out", text, settings(), QUIET)
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_what_calibration_missed_is_refused_before_training(
    one_sided: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantize_steps, "train", None)
    monkeypatch.setattr(quantize_steps, "measure", None)
    qat = settings(mode="qat_int8", steps=3, strict=True)
    budget = settings(mode="mixed_precision", target_bits=9.0, strict=True)
    for how in (qat, budget):
        with pytest.raises(ReceiptError, match=r"no calibration data reached .*experts\.1\.up"):
            run_quantize(one_sided, tmp_path / "out", text, how, QUIET)
    assert not (tmp_path / "out").exists()


def test_too_little_text_is_refused_before_calibration(
    checkpoint: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CalibrationWindows, "batches", None)
    monkeypatch.setattr(evaluate, "TOKENS_A_BATCH", 1 << 30)
    how = settings(mode="qat_int8", steps=3)
    with pytest.raises(DataError, match="a training step takes"):
        run_quantize(checkpoint, tmp_path / "out", text, how, QUIET)
    how = QuantizeSettings("mixed_precision", target_bits=9.0, calibration_tokens=40)
    with pytest.raises(InputError, match="allow more --calibration-tokens"):
        run_quantize(checkpoint, tmp_path / "out", text, how, QUIET)


def without_data(checkpoint: Path, text: Path, folder: Path, with_samples: bool = True) -> Path:
    """The checkpoint as training leaves it: it knows its text, and may hold samples of it."""
    model, tokenizer = load_checkpoint(checkpoint)
    corpus = load_corpus(text)
    model.config.training_text = origin_of(corpus)
    windows = TokenWindows(encode(tokenizer, corpus.train), 32)
    save_checkpoint(folder, model, tokenizer, samples_of(windows) if with_samples else None)
    return folder


def test_samples_in_the_checkpoint_do_what_its_text_does(
    checkpoint: Path, text: Path, tmp_path: Path
) -> None:
    source = without_data(checkpoint, text, tmp_path / "float")
    options: dict[str, Any] = {"mode": "ptq_int4", "group_size": 8, "min_size": 0}
    tensors = []
    for data, name in ((text, "one"), (None, "two")):
        found = run_quantize(source, tmp_path / name, data, QuantizeSettings(**options), QUIET)
        assert found["warning"] is None
        tensors.append((tmp_path / name / "model.safetensors").read_bytes())
    assert found["corpus"] == f"{text.name}, samples in the checkpoint"
    assert tensors[0] == tensors[1]
    origin = load_checkpoint(tmp_path / "two")[0].config.training_text
    assert origin is not None
    assert origin["name"] == text.name


def test_without_a_text_that_does_it_asks_for_one(
    checkpoint: Path, text: Path, tmp_path: Path
) -> None:
    for source, options, reason in (
        (checkpoint, {}, "does not say what it was trained on; name its text with --data"),
        (
            without_data(checkpoint, text, tmp_path / "a", False),
            {},
            f"trained on {text.name}; name its",
        ),
        (
            without_data(checkpoint, text, tmp_path / "b"),
            {"mode": "qat_int8", "steps": 1},
            r"and holds only [\d,]+ tokens of it, but this takes more; name its text with --data",
        ),
    ):
        with pytest.raises(InputError, match=reason):
            run_quantize(source, tmp_path / "out", None, settings(**options), QUIET)
        assert not (tmp_path / "out").exists()


def test_another_text_is_said_loudly(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    source = without_data(checkpoint, text, tmp_path / "float")
    other = tmp_path / "foreign"
    other.mkdir()
    (other / "train.txt").write_text("something else entirely . " * 2000, encoding="utf-8")
    console = Console(record=True, width=60, file=io.StringIO())
    found = run_quantize(source, tmp_path / "out", other, settings(), console)
    assert f"trained on {text.name}, but foreign is another text" in found["warning"]
    assert found["warning"] in console.export_text()
