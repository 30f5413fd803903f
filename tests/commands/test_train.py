"""`bkcore train`: from text to a model, alone and in two processes."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from bkcore import cli
from bkcore.cli import app
from bkcore.errors import DataError
from bkcore.evaluation.checkpoints import load_checkpoint
from bkcore.evaluation.perplexity import perplexity_per_word, score
from bkcore.text import TokenWindows, count_words, encode, load_corpus, origin_of
from bkcore.training import Schedule, train

RECIPE = """
tokenizer: {vocab_size: 300}
model: {d_model: 16, n_layers: 2, num_experts: 2, expert_size: 16, load_balancing: 0.0}
training:
  {window: 32, batch_size: 4, steps: 8, learning_rate: 1e-2, evaluate_every: 4, max_minutes: 60}
"""


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    lines = [f"site {i * 7 % 11} hops to {i * i % 13} and back .\n" for i in range(1200)]
    (folder / "train.txt").write_text("".join(lines))
    (folder / "valid.txt").write_text("".join(lines[:150]))
    return folder


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "small.yaml"
    path.write_text(RECIPE)
    return path


@pytest.fixture(scope="module")
def alone(text: Path, recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("alone") / "run"
    invoke(text, recipe, output)
    return output


def invoke(text: Path, recipe: Path, output: Path, *more: str) -> str:
    arguments = ["--config", recipe, "--data", text, "--output", output, *more]
    result = CliRunner().invoke(app, ["train", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def two_processes(text: Path, recipe: Path, output: Path) -> str:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    arguments = ["--config", recipe, "--data", text, "--output", output]
    done = subprocess.run(
        [*launcher, "--nproc_per_node", "2", "-m", "bkcore", "train", *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def model_weights(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "model" / "model.safetensors")


def test_the_model_is_the_one_that_was_measured(alone: Path, text: Path) -> None:
    report = json.loads((alone / "training.json").read_text())
    model, tokenizer = load_checkpoint(alone / "model")
    valid = (text / "valid.txt").read_text()
    tokens = encode(tokenizer, valid)
    scores = score(model, tokens, window=32, batch_size=16, bos_id=0)
    best = report["best"]
    assert best["eval_ppl_word"] == pytest.approx(perplexity_per_word(scores, count_words(valid)))
    assert best["eval_ppl_token"] == pytest.approx(math.exp(best["eval_loss"]))
    assert [entry["step"] for entry in report["curve"] if "eval_loss" in entry] == [4, 8]
    assert report["training_tokens"] == 8 * 4 * 32
    assert report["parameters"] == sum(p.numel() for p in model.parameters())
    assert report["protocol"]["tokens"] == len(tokens)
    assert report["recipe"]["schedule"]["steps"] == 8
    # It learned something: a uniform guess has the size of the vocabulary.
    assert best["eval_ppl_token"] < len(tokenizer) / 2


def test_the_model_knows_its_text_and_is_quantized_without_it(
    alone: Path, text: Path, tmp_path: Path
) -> None:
    model, _ = load_checkpoint(alone / "model")
    assert model.config.training_text == origin_of(load_corpus(text))
    command = ["quantize", str(alone / "model"), str(tmp_path / "int8")]
    result = CliRunner().invoke(app, command, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert f"tokens of {text.name}, samples in the checkpoint" in result.output


def test_more_training_makes_a_model_forget_its_text(alone: Path) -> None:
    model, _ = load_checkpoint(alone / "model")
    ids = torch.arange(200) % 300
    train(model, TokenWindows(ids, 32), Schedule(steps=1, batch_size=2, learning_rate=1e-3))
    assert model.config.training_text is None


def test_a_second_run_changes_nothing_and_a_fresh_one_repeats(
    alone: Path, text: Path, recipe: Path, tmp_path: Path
) -> None:
    before = model_weights(alone)
    again = invoke(text, recipe, alone)
    line = f"the training in {alone} was finished before; nothing was left to do\n"
    assert again.count(line) == 1
    assert "perplexity" in again
    assert "holds an earlier model" not in again
    first = invoke(text, recipe, tmp_path)
    assert "nothing was left" not in first
    assert "holds an earlier model" not in first
    output = invoke(text, recipe, tmp_path, "--no-resume")
    assert "step 8" in output
    assert f"{tmp_path / 'model'} holds an earlier model, to be replaced" in output
    for name, weight in before.items():
        assert torch.equal(model_weights(alone)[name], weight)
        assert torch.equal(model_weights(tmp_path)[name], weight)


@pytest.mark.slow
def test_two_processes_make_one_model(
    alone: Path, text: Path, recipe: Path, tmp_path: Path
) -> None:
    """That they agree with one to rounding is tested in float64, in training."""
    printed = two_processes(text, recipe, tmp_path)
    assert printed.count("best at step") == 1
    assert printed.count("per word") == 3  # two evaluations and the best of them
    ours, theirs = (json.loads((run / "training.json").read_text()) for run in (tmp_path, alone))
    assert ours["curve"][0]["loss"] == pytest.approx(theirs["curve"][0]["loss"], rel=1e-6)
    assert [e["step"] for e in ours["curve"]] == [e["step"] for e in theirs["curve"]]
    assert model_weights(tmp_path).keys() == model_weights(alone).keys()


@pytest.mark.parametrize(
    ("content", "complaint"),
    [(b"", "no text"), (b"\0" * 30_000, "NUL"), (b"too little", "only 10 characters")],
)
def test_bad_text_is_refused_before_any_training(
    tmp_path: Path, recipe: Path, content: bytes, complaint: str, monkeypatch: Any
) -> None:
    monkeypatch.setattr("bkcore.training.trainer.train", lambda *_, **__: pytest.fail("it trained"))
    folder = tmp_path / "text"
    folder.mkdir()
    (folder / "train.txt").write_bytes(content)
    (folder / "valid.txt").write_text("some words of text\n" * 500)
    with pytest.raises(DataError, match=complaint):
        invoke(folder, recipe, tmp_path / "run")


def test_too_little_text_for_the_windows_is_refused(
    text: Path, tmp_path: Path, recipe: Path
) -> None:
    large = tmp_path / "large.yaml"
    large.write_text(recipe.read_text().replace("batch_size: 4", "batch_size: 4000"))
    with pytest.raises(DataError, match="training windows, fewer than one batch of 4000"):
        invoke(text, large, tmp_path / "run")


def test_an_error_is_one_sentence_and_exit_code_2(
    recipe: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(cli, "keep_freed_memory", lambda: None)
    missing = ["--config", str(recipe), "--data", str(tmp_path / "none")]
    command = ["bkcore", "train", *missing, "--output", str(tmp_path / "run")]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("bkcore: ")
    assert "Traceback" not in error
