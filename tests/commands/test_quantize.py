"""`bkcore quantize`: modes, bit budgets, the receipt, and what --strict refuses."""

from __future__ import annotations

import io
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from bkcore.cli import app
from bkcore.commands import quantize_steps
from bkcore.commands.quantize_settings import QuantizeSettings
from bkcore.commands.quantize_steps import UNIFORM_MODES, run_quantize
from bkcore.errors import CheckpointError, DataError, DivergenceError, InputError, ReceiptError
from bkcore.evaluation import evaluate
from bkcore.evaluation.calibration import CalibrationWindows
from bkcore.evaluation.checkpoints import load_checkpoint, save_checkpoint
from bkcore.evaluation.rows import average_bits
from bkcore.evaluation.samples import samples_of
from bkcore.model import LanguageModel
from bkcore.model.receipt_file import read
from bkcore.text import TokenWindows, encode, load_corpus, origin_of, spread, train_tokenizer
from bkcore.training import train

LINES = [
    f"the {('slow', 'quick', 'lonely')[i * i % 3]} fox sees site {i * 7 % 11} again .\n"
    for i in range(1500)
]
TRAIN, VALID = "".join(LINES[100:]), "".join(LINES[:100])
QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    (folder / "train.txt").write_text(TRAIN)
    (folder / "valid.txt").write_text(VALID)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model whose second expert is all but deaf to noise: its output is nearly zero."""
    folder = tmp_path_factory.mktemp("float")
    torch.manual_seed(0)
    tokenizer = train_tokenizer(TRAIN, 300)
    sizes: dict[str, Any] = {
        "num_experts": 2,
        "experts_per_token": 2,
        "expert_size": 24,
        "key_size": 4,
    }
    model: Any = LanguageModel(len(tokenizer), 16, 1, 32, embedding_multiplier=1.0, **sizes)
    torch.nn.init.normal_(model.layers[0].mixer.out_proj.weight, std=0.3)
    model.embedding.weight.data.mul_(20)
    model.layers[0].experts.experts[1].down.weight.data.mul_(1e-3)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def settings(**options: object) -> QuantizeSettings:
    if not str(options.get("mode", "ptq_int8")).endswith("int8"):
        options = {"group_size": 8, **options}
    if str(options.get("mode", "ptq_int8")) in UNIFORM_MODES and not (
        {"target_bits", "max_increase"} & set(options)
    ):
        options = {"min_size": 0, **options}  # all weights are small here
    return QuantizeSettings(calibration_tokens=512, **options)  # type: ignore[arg-type]


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


def test_the_command_names_both_folders_once(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    out, control = str(tmp_path / "int8"), str(tmp_path / "control")
    how = ["--mode", "qat_int8", "--steps", "1", "--calibration-tokens", "64", "--data", str(text)]
    result = CliRunner().invoke(app, ["quantize", str(checkpoint), out, *how, "--control", control])
    assert result.exit_code == 0, result.output
    assert result.output.count(f"Checkpoint: {out}\n") == 1
    assert result.output.count(f"Control: {control}\n") == 1


def test_the_command_says_what_it_read_and_what_it_wrote(
    checkpoint: Path, text: Path, tmp_path: Path
) -> None:
    few = ["--calibration-tokens", "10", "--data", str(text)]  # a window has 32
    command = ["quantize", str(checkpoint), str(tmp_path / "int8"), *few]
    output = CliRunner().invoke(app, command, catch_exceptions=False).output
    assert f"Calibrated on 32 tokens of {text.name}\n" in output
    written = ("config.json", "generation_config.json", "model.safetensors")
    size = sum((tmp_path / "int8" / name).stat().st_size for name in written)
    in_float32 = 4 * load_checkpoint(checkpoint)[0].num_parameters()
    line = f"Size: {size / 1e6:.2f} MB, {size / in_float32:.1%} of the {in_float32 / 1e6:.2f} MB"
    assert line in output
    receipt = CliRunner().invoke(app, ["receipt", str(tmp_path / "int8")], catch_exceptions=False)
    assert line in receipt.output


def test_a_control_that_cannot_be(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not train"):
        run_quantize(checkpoint, tmp_path / "a", text, settings(), QUIET, tmp_path / "b")
    how = settings(mode="qat_int8", steps=1)
    for folder in (checkpoint, tmp_path / "a"):
        with pytest.raises(InputError, match="folder of its own"):
            run_quantize(checkpoint, tmp_path / "a", text, how, QUIET, folder)
    assert not (tmp_path / "a").exists()


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


def test_the_frontier_goes_from_small_to_good(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    arguments = ["quantize", str(checkpoint), str(tmp_path / "out"), "--data", str(text)]
    arguments += ["--group-size=8", "--calibration-tokens=512", "--max-ppl-increase=1%"]
    picture, report = tmp_path / "frontier.svg", tmp_path / "report.json"
    arguments += ["--frontier", str(picture), "--json", str(report)]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert picture.read_bytes().startswith(b"<?xml")
    points = json.loads(report.read_text())["points"]
    assert points[0]["name"] == "saved"
    assert points[0]["ci_high_pct"] <= 1
    line = [point for point in points if point["name"] == "budget"]
    assert [point["bytes"] for point in line] == sorted(point["bytes"] for point in line)
    # All in 4 bits and all in 16 but the core. The model is not trained, so that rounding may make
    # it better or worse, but fewer bits change it more.
    assert abs(line[0]["delta_pct"]) > abs(line[-1]["delta_pct"])
    assert {point["name"] for point in points[-3:]} == {"ptq_int8", "ptq_int4", "mixed_precision"}


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
    checkpoint: Path, text: Path, tmp_path: Path
) -> None:
    model, tokenizer = load_checkpoint(checkpoint)
    with torch.no_grad():  # with one expert a token, all go to the first
        model.get_parameter("layers.0.experts.router.weight").zero_()
    model.config.experts_per_token = 1
    model.save_pretrained(tmp_path / "deaf")
    tokenizer.save_pretrained(tmp_path / "deaf")
    with pytest.raises(ReceiptError, match=r"no calibration data reached .*experts\.1\.up"):
        run_quantize(tmp_path / "deaf", tmp_path / "out", text, settings(strict=True), QUIET)
    assert not (tmp_path / "out").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "note").write_text("mine")
    with pytest.raises(ReceiptError):
        run_quantize(tmp_path / "deaf", tmp_path / "mine", text, settings(strict=True), QUIET)
    assert (tmp_path / "mine" / "note").read_text() == "mine"
    run_quantize(tmp_path / "deaf", tmp_path / "out", text, settings(), QUIET)
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_what_calibration_missed_is_refused_before_training(
    checkpoint: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = load_checkpoint(checkpoint)
    with torch.no_grad():  # with one expert a token, all go to the first
        model.get_parameter("layers.0.experts.router.weight").zero_()
    model.config.experts_per_token = 1
    model.save_pretrained(tmp_path / "deaf")
    tokenizer.save_pretrained(tmp_path / "deaf")
    monkeypatch.setattr(quantize_steps, "train", None)
    monkeypatch.setattr(quantize_steps, "measure", None)
    qat = settings(mode="qat_int8", steps=3, strict=True)
    budget = settings(mode="mixed_precision", target_bits=9.0, strict=True)
    for how in (qat, budget):
        with pytest.raises(ReceiptError, match=r"no calibration data reached .*experts\.1\.up"):
            run_quantize(tmp_path / "deaf", tmp_path / "out", text, how, QUIET)
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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "qat_int8"}, "--steps"),
        ({"mode": "ptq_int8", "steps": 3}, "takes no --steps"),
        ({"mode": "ptq_int8", "learning_rate": 1e-3}, "takes no --learning-rate"),
        ({"mode": "qat_int8", "steps": 3, "group_size": 64}, "and takes no --group-size"),
        ({"mode": "ptq_int4", "distill": False}, "takes no --distill and no --no-distill"),
        ({"mode": "ptq_int4", "target_bits": 5.0}, "mixes precisions"),
        ({"frontier": True}, "--frontier needs"),
        ({"mode": "mixed_precision", "target_bits": 5.0, "max_increase": 1.0}, "not both"),
        ({"mode": "mixed_precision", "max_increase": -3.0}, "must be positive, not -3 %"),
        ({"mode": "mixed_precision", "target_bits": math.nan}, "at most 16, not nan"),
        ({"mode": "mixed_precision", "target_bits": math.inf}, "at most 16, not inf"),
        ({"mode": "mixed_precision", "target_bits": -4.0}, "at most 16, not -4"),
        ({"mode": "int8"}, "unknown quantization mode"),
        ({"mode": "qat_int8", "steps": 3, "learning_rate": -1.0}, "learning_rate must be"),
    ],
)
def test_choices_that_exclude_each_other(options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        settings(**options)


def test_folders_that_cannot_be(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is the checkpoint itself"):
        run_quantize(checkpoint, checkpoint, text, settings(), QUIET)
    run_quantize(checkpoint, tmp_path / "int8", text, settings(), QUIET)
    run_quantize(checkpoint, tmp_path / "int8", text, settings(), QUIET)  # quickly made again
    with pytest.raises(InputError, match="is quantized"):
        run_quantize(tmp_path / "int8", tmp_path / "again", text, settings(), QUIET)
    with pytest.raises(DataError):
        run_quantize(checkpoint, tmp_path / "again", tmp_path / "nowhere", settings(), QUIET)
    assert not (tmp_path / "again").exists()
    with pytest.raises(CheckpointError, match="has no receipt"):
        read(checkpoint)


def test_no_float_model_is_lost(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    other = shutil.copytree(checkpoint, tmp_path / "other")
    before = (other / "model.safetensors").read_bytes()
    how = settings(mode="qat_int8", steps=1)
    for output, control in ((other, None), (tmp_path / "new", other)):
        with pytest.raises(InputError, match="other holds a float model, which would be lost"):
            run_quantize(checkpoint, output, text, how, QUIET, control)
    (other / "config.json").write_text("{")
    with pytest.raises(InputError, match="other may hold a model, but its config"):
        run_quantize(checkpoint, other, text, how, QUIET)
    assert (other / "model.safetensors").read_bytes() == before
    assert not (tmp_path / "new").exists()


def test_the_receipt_is_printed(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    run_quantize(checkpoint, tmp_path, text, settings(mode="mixed_precision"), QUIET)
    output = CliRunner().invoke(app, ["receipt", str(tmp_path)], catch_exceptions=False).output
    for part in ("0.experts.1.down", "product", "0.found.imag", "router: small", "asym."):
        assert part in output


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
