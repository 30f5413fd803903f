"""What `bkcore demo` shows before it trains: the shipped model, as it is and in INT4."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from safetensors.torch import load_file
from typer.testing import CliRunner

from bkcore.cli import app
from bkcore.commands.demo import PROMPT, show_shipped
from bkcore.display.console import Console
from bkcore.errors import DataError, InputError
from bkcore.evaluation.checkpoints import load_checkpoint, save_checkpoint
from bkcore.evaluation.samples import samples_of
from bkcore.text import TokenWindows, encode, load_corpus


def shown(checkpoint: Path) -> list[str]:
    console = Console(file=io.StringIO())
    show_shipped(console, checkpoint)
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined]


@pytest.fixture
def with_samples(fox_checkpoint: Path, fox_text: Path) -> Path:
    model, tokenizer = load_checkpoint(fox_checkpoint)
    windows = TokenWindows(encode(tokenizer, load_corpus(fox_text).train), 32)
    save_checkpoint(fox_checkpoint, model, tokenizer, samples_of(windows))
    return fox_checkpoint


def test_continues_a_sentence_in_float_and_in_int4(with_samples: Path) -> None:
    first, second = shown(with_samples)
    for line, name in ((first, "float32"), (second, "INT4")):
        assert re.match(rf"{name}, \d+\.\d MB: {re.escape(PROMPT.strip())}.+", line)
    tensors = load_file(with_samples / "model.safetensors").values()
    assert f"{sum(x.numel() * 4 for x in tensors) / 1e6:.1f} MB" in first
    assert second.split(",")[1] != first.split(",")[1]


def test_bad_data_is_refused_before_anything_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bkcore.commands.demo.show_shipped", None)
    monkeypatch.setattr("bkcore.comparison.demo.run_demo", None)
    (tmp_path / "train.txt").write_text("")
    (tmp_path / "valid.txt").write_text("")
    output = tmp_path / "out"
    result = CliRunner().invoke(app, ["demo", "--data", str(tmp_path), "--output", str(output)])
    assert isinstance(result.exception, DataError)
    assert "no text" in str(result.exception)
    assert not result.output
    assert not output.exists()


def test_checkpoints_that_the_demo_replaces_are_named_before(
    fox_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*arguments: object) -> None:
        raise InputError("far enough")

    monkeypatch.setattr("bkcore.comparison.demo.run_demo", stop)
    for name in ("float32", "qat_int4"):
        (tmp_path / "out" / name).mkdir(parents=True)
        (tmp_path / "out" / name / "config.json").touch()
    monkeypatch.chdir(tmp_path)
    command = ["demo", "--data", str(fox_text), "--output", "out"]
    result = CliRunner().invoke(app, command)
    assert "out/float32, out/qat_int4 hold earlier models, to be replaced" in result.output


def test_says_why_there_is_nothing_to_show(tmp_path: Path, fox_checkpoint: Path) -> None:
    (line,) = shown(tmp_path / "nothing")
    assert "the shipped model cannot be shown first: there is no checkpoint folder" in line
    first, line = shown(fox_checkpoint)
    assert first.startswith("float32")
    assert "no samples of its training text" in line
