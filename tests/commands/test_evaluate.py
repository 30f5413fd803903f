"""Judging a checkpoint by command: what is printed, and what the file holds."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from bkcore.cli import app
from bkcore.commands.evaluate import run_evaluation
from bkcore.errors import InputError
from bkcore.evaluation import checkpoints, evaluate
from bkcore.text import load_corpus, origin_of


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluate in this process, which is quicker than starting another."""
    monkeypatch.setattr(evaluate, "evaluate_in_new_process", evaluate.evaluate_checkpoint)


@pytest.fixture
def quantized(fox_checkpoint: Path) -> Path:
    model, tokenizer = checkpoints.load_checkpoint(fox_checkpoint)
    model.configure_quantization("ptq_int4")
    model.calibrate_quantization([torch.randint(len(tokenizer), (2, 20))])
    folder = fox_checkpoint.parent / "int4"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_the_window_is_that_of_the_training(fox_checkpoint: Path, fox_text: Path) -> None:
    quiet = Console(quiet=True)
    assert run_evaluation(fox_checkpoint, fox_text, None, quiet)["protocol"]["window"] == 48
    assert run_evaluation(fox_checkpoint, fox_text, None, quiet, 20)["protocol"]["window"] == 20


def test_a_text_of_one_window_is_refused_before_it_is_scored(
    fox_checkpoint: Path, fox_text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate, "score", None)
    with pytest.raises(InputError, match=r"and a window has 100000; one window"):
        run_evaluation(fox_checkpoint, fox_text, None, Console(quiet=True), 100_000)


def test_the_table_says_what_the_file_does(
    quantized: Path, fox_checkpoint: Path, fox_text: Path, tmp_path: Path
) -> None:
    file = tmp_path / "found.json"
    paths = [str(quantized), "--reference", str(fox_checkpoint), "--data", str(fox_text)]
    how = ["--json", str(file), "--output", str(tmp_path / "unfinished")]
    run = CliRunner().invoke(app, ["evaluate", *paths, *how], catch_exceptions=False)
    found = json.loads(file.read_text())
    lines = {line[:40].strip(): line[40:].split() for line in run.output.splitlines()}
    assert lines["perplexity per word"] == [f"{found['ppl_word']:.2f}"]
    assert lines["perplexity per token"] == [f"{found['ppl_token']:.3f}"]
    assert lines["change from the reference, %"] == [f"{found['delta_pct']:+.2f}"]
    assert lines["KL divergence from it, nats per token"] == [f"{found['kl_nats']:.5f}"]
    assert lines["times smaller"] == [f"{found['size_ratio']:.2f}"]
    assert lines["tokens scored"] == [f"{found['protocol']['tokens']:,}"]
    assert "load of the experts" in run.output


def test_without_a_reference_nothing_is_compared(
    fox_checkpoint: Path, fox_text: Path, tmp_path: Path
) -> None:
    how = ["--data", str(fox_text), "--window", "20", "--output", str(tmp_path / "unfinished")]
    run = CliRunner().invoke(app, ["evaluate", str(fox_checkpoint), *how], catch_exceptions=False)
    output = run.output
    assert "perplexity per word" in output
    assert "reference" not in output


def test_another_text_than_the_models_own_is_said_loudly(
    fox_checkpoint: Path, fox_text: Path, tmp_path: Path
) -> None:
    model, tokenizer = checkpoints.load_checkpoint(fox_checkpoint)
    model.config.training_text = origin_of(load_corpus(fox_text))
    checkpoints.save_checkpoint(tmp_path / "knows", model, tokenizer)
    quiet = Console(quiet=True)
    assert run_evaluation(tmp_path / "knows", fox_text, None, quiet)["warning"] is None
    assert run_evaluation(fox_checkpoint, fox_text, None, quiet)["warning"] is None
    (fox_text / "valid.txt").write_text("the dog sees nothing. " * 300, encoding="utf-8")
    console = Console(record=True, width=60, file=io.StringIO())
    found = run_evaluation(tmp_path / "knows", fox_text, None, console)["warning"]
    assert "its perplexity says little about the model" in found
    assert found in console.export_text()
