"""The command as a process sees it: exit codes, and streams and signals that are not as hoped."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.utils import logging as transformers_logging
from typer.testing import CliRunner

import bkcore
from bkcore import cli
from bkcore.commands import export, generate
from bkcore.evaluation import checkpoints, evaluate
from bkcore.model import LanguageModel
from bkcore.text import train_tokenizer
from bkcore.training import trainer
from bkcore_runtime import loading
from tests.slow import combinations

TEXT = "the slow fox sees the quick dog and the dog sees the fox. " * 600
LINE = "".join(chr(0x4E00 + n * 7 % 2000) for n in range(400)) + "\n"
RECIPE = """
tokenizer: {vocab_size: 300}
model: {d_model: 16, n_layers: 1, num_experts: 2, expert_size: 16}
training: {window: 32, batch_size: 4, steps: 4, learning_rate: 1e-2, evaluate_every: 2}
"""

Run = Callable[..., int]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float model, one with another tokenizer, an INT8 one, and texts."""
    folder = tmp_path_factory.mktemp("command")
    for name, text in (("float", TEXT), ("other", TEXT.replace("fox", "xylophone"))):
        torch.manual_seed(0)
        tokenizer = train_tokenizer(text, 300)
        model = LanguageModel(len(tokenizer), 16, 1, 48, num_experts=2, expert_size=16, key_size=4)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        if name == "float":
            model.configure_quantization("ptq_int8")
            model.calibrate_quantization([torch.randint(len(tokenizer), (2, 20))])
            model.save_pretrained(folder / "int8")
            tokenizer.save_pretrained(folder / "int8")
    for name, train_text, valid in (("text", TEXT, TEXT[:6000]), ("cjk", LINE * 60, LINE * 8)):
        (folder / name).mkdir()
        (folder / name / "train.txt").write_text(train_text, encoding="utf-8")
        (folder / name / "valid.txt").write_text(valid, encoding="utf-8")
    (folder / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    return folder


@pytest.fixture
def run(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a command in an empty folder and gives its exit code; models are evaluated in here."""
    monkeypatch.setattr(cli, "keep_freed_memory", lambda: None)
    monkeypatch.setattr(evaluate, "evaluate_in_new_process", evaluate.evaluate_checkpoint)
    monkeypatch.chdir(tmp_path)
    for name in ("float", "other", "int8", "text", "cjk", "recipe.yaml"):
        (tmp_path / name).symlink_to(folder / name)

    def run(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["bkcore", *arguments])
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert isinstance(end.value.code, int)
        return end.value.code

    return run


EVALUATE = ("evaluate", "float", "--data", "text", "--output", "kept")
COMMANDS = {
    "evaluate": (*EVALUATE, "--json", "out.json"),
    "receipt": ("receipt", "int8", "--json", "out.json"),
    "quantize": (
        *("quantize", "float", "new", "--data", "text", "--calibration-tokens", "96"),
        *("--json", "out.json"),
    ),
}


# ---- standard output ------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_a_full_output_loses_no_file(
    run: Run, command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with open("/dev/full", "w", encoding="utf-8") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert run(*COMMANDS[command]) == 2
    assert "bkcore: standard output could not be written: No space left" in capsys.readouterr().err
    assert json.loads(Path("out.json").read_text())


def test_a_closed_pipe_ends_in_silence(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w", encoding="utf-8") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert run(*COMMANDS["evaluate"]) == 128 + signal.SIGPIPE
    assert capsys.readouterr().err == ""
    assert json.loads(Path("out.json").read_text())


def test_an_output_of_ascii_gets_what_it_can(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (tmp_path / "printed").open("w", encoding="ascii") as file:
        monkeypatch.setattr(sys, "stdout", file)
        assert run(*COMMANDS["evaluate"]) == 0
    printed = (tmp_path / "printed").read_text(encoding="ascii")
    assert " ? 0." in printed  # of the standard error
    assert "perplexity per word" in printed
    assert json.loads(Path("out.json").read_text())
    assert not list(Path("kept").glob("*"))


def test_a_result_that_went_nowhere_is_kept(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    with open("/dev/full", "w", encoding="utf-8") as full, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", full)
        assert run(*EVALUATE) == 2
    assert run(*EVALUATE, "--json", "/dev/full") == 2
    assert len(list(Path("kept").iterdir())) == 1
    monkeypatch.setattr("bkcore.evaluation.perplexity._token_nll", None)  # nothing is scored again
    assert run(*EVALUATE) == 0
    assert not list(Path("kept").iterdir())


@pytest.mark.parametrize("command", COMMANDS)
def test_a_file_that_cannot_be_written_is_told_after_the_result(
    run: Run, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [each.replace("out.json", "/dev/full") for each in COMMANDS[command]]
    assert run(*arguments) == 2
    printed = capsys.readouterr()
    assert ("perplexity per word" if command == "evaluate" else "Size: ") in printed.out
    assert printed.err == "bkcore: /dev/full could not be written: No space left on device\n"


@pytest.mark.parametrize("closed", combinations([">&-", "2>&- <&-"], quick=[">&-"]))
def test_streams_that_are_closed(folder: Path, tmp_path: Path, closed: str) -> None:
    """As a shell closes them: no file of the command takes their place."""
    command = f"{sys.executable} -m bkcore receipt {folder / 'int8'} --json out.json {closed}"
    done = subprocess.run(
        command, shell=True, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == (2 if closed == ">&-" else 0)
    if closed == ">&-":
        assert done.stderr == "bkcore: standard output could not be written: Bad file descriptor\n"
    assert json.loads((tmp_path / "out.json").read_text())["weights"]


# ---- interruptions --------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize(
    ("where", "name", "arguments", "kept"),
    [
        (evaluate, "score", EVALUATE, "kept keeps what was scored"),
        (
            trainer,
            "train",
            ("train", "--config", "recipe.yaml", "--data", "text", "--output", "runs"),
            "runs keeps the checkpoints",
        ),
        (loading, "load", ("generate", "float"), ""),
        (checkpoints, "load_checkpoint", ("export", "float", "half"), ""),
    ],
)
def test_an_interruption_is_a_sentence(
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    number: signal.Signals,
    code: int,
    where: Any,
    name: str,
    arguments: tuple[str, ...],
    kept: str,
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(where, name, lambda *_, **__: os.kill(os.getpid(), number))
    assert run(*arguments) == code
    error = " ".join(capsys.readouterr().err.split())
    assert error.startswith("bkcore: interrupted")
    assert kept in error
    assert "Traceback" not in error
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_signal_ends_a_process_and_the_one_that_it_waits_for(folder: Path) -> None:
    """A whole command, sent away while its other process starts."""
    command = [sys.executable, "-m", "bkcore", *EVALUATE]
    with subprocess.Popen(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        while not children.read_text():
            assert process.poll() is None
            time.sleep(0.01)
        process.terminate()
        printed, _ = process.communicate(timeout=60)
    assert process.returncode == 143
    assert "bkcore: interrupted" in printed
    assert "Traceback" not in printed, printed


# ---- what is refused early, and how it is said ----------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("evaluate", "float", "--reference", "other"), "different tokenizers"),
        (("evaluate", "float", "--json", "text"), "text is a folder"),
        (("evaluate", "float", "--json", "float/config.json"), "which is read"),
        (
            ("evaluate", "float", "--output", "recipe.yaml"),
            "recipe.yaml cannot be used as a folder",
        ),
        (("quantize", "float", "new", "--json", "new"), "--json and OUTPUT are both new"),
        (("quantize", "float", "recipe.yaml"), "recipe.yaml cannot be used as a folder"),
        (("quantize", "float", "new", "--strict"), "stayed float16"),
        (
            ("quantize", "float", "new", "--target-bits=9", "--calibration-tokens=9"),
            "tells nothing about the spread",
        ),
        (
            ("train", "--config", "recipe.yaml", "--output", "recipe.yaml"),
            "cannot be used as a folder",
        ),
        (("train", "--config", "recipe.yaml", "--plot", "curve.jpg"), "must be a .png or .svg"),
        (("receipt", "int8", "--json", "int8/receipt.json"), "which is read"),
        (("demo", "--output", "recipe.yaml"), "cannot be used as a folder"),
        (("compare", "--output", "recipe.yaml"), "cannot be used as a folder"),
        (("bench", "stream", "--json", "text"), "text is a folder"),
        (("bench", "kernels", "--json", "a", "--markdown", "a"), "are both a"),
        (("generate", "float", "--prompt", "\udcff"), "not valid UTF-8 text"),
        (("export", "float", "recipe.yaml"), "cannot be used as a folder"),
    ],
)
def test_refused_before_the_work(
    run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    complaint: str,
) -> None:
    """Nothing is scored, calibrated or trained, and nothing is left."""
    for name in ("evaluation.evaluate.score", "training.trainer.train", "comparison.demo.train"):
        monkeypatch.setattr(f"bkcore.{name}", None)
    monkeypatch.setattr(LanguageModel, "calibrate_quantization", None, raising=False)
    before = sorted(tmp_path.rglob("*"))
    needs_text = arguments[0] in ("evaluate", "quantize", "train", "demo", "compare")
    assert run(*arguments, *(["--data", "text"] if needs_text else [])) == 2
    assert complaint in " ".join(capsys.readouterr().err.split())
    assert sorted(tmp_path.rglob("*")) == before


def test_names_with_brackets_and_line_ends_are_named(
    run: Run, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("exp[lr=1e-3]", "a[/b]", ":smile:", "line\nend\x1b[31m"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).symlink_to(folder / "float")
        json_file = f"{name}.json"
        assert run("evaluate", name, "--data", "text", "--json", json_file) == 0
        printed = capsys.readouterr().out
        shown = name.replace("\x1b", "\\x1b").split("/")[-1]
        assert all(part in printed for part in shown.splitlines())
        assert "\x1b" not in printed
        assert Path(json_file).exists()
    assert run("evaluate", "gone[/b]", "--data", "text") == 2
    assert "gone[/b]" in capsys.readouterr().err.replace("\n", "")  # it is wrapped anywhere


def test_generated_text_is_printed_as_it_is(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "the [red]fox[/red] [/b] :smile: \x1b[31mred"
    monkeypatch.setattr(generate, "continue_text", lambda *_: text)
    assert run("generate", "float") == 0
    assert capsys.readouterr().out == text + "\n"


def test_a_remedy_is_printed_whole(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert run("bench", "kernels", "--plot", "a.svg") == 2
    assert "pip install 'bkcore[plot]'" in " ".join(capsys.readouterr().err.split())


def test_an_error_of_the_system_is_a_sentence(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device", "some/file[/b]")

    monkeypatch.setattr(export, "export_half", full)
    assert run("export", "float", "half") == 2
    assert capsys.readouterr().err == "bkcore: some/file[/b]: No space left on device\n"


# ---- JSON and the split that is read --------------------------------------------------------


def test_a_word_of_400_letters_has_no_perplexity(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("evaluate", "float", "--data", "cjk", "--json", "out.json") == 0
    found = json.loads(Path("out.json").read_text(), parse_constant=pytest.fail)
    assert found["ppl_word"] is None
    assert "infinite" in found["ppl_word_reason"]
    printed = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "perplexity per word -" in printed
    assert any(line.startswith("bits per byte ") for line in printed)


def test_a_training_on_words_of_400_letters_has_no_infinities(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("train", "--config", "recipe.yaml", "--data", "cjk", "--output", "runs") == 0
    files = list(Path("runs").rglob("*.json"))
    assert any(path.name == "trainer_state.json" for path in files)
    for path in files:
        json.loads(path.read_text(encoding="utf-8"), parse_constant=pytest.fail)
    report = json.loads(Path("runs/training.json").read_text())
    assert report["best"]["eval_ppl_word"] is None
    assert "- per word" in capsys.readouterr().out


def test_a_command_reads_the_split_that_it_needs(run: Run, folder: Path, tmp_path: Path) -> None:
    for split in ("train", "valid"):
        (tmp_path / split).mkdir()
        (tmp_path / split / f"{split}.txt").symlink_to(folder / "text" / f"{split}.txt")
    assert run("evaluate", "float", "--data", "valid") == 0
    assert run("evaluate", "float", "--data", "train") == 2
    quantize = ("quantize", "float", "new", "--calibration-tokens", "96", "--data")
    assert run(*quantize, "valid") == 2
    assert run(*quantize, "train") == 0


# ---- the logging of transformers ------------------------------------------------------------


def test_transformers_is_quiet_during_a_command_only(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, bool]] = []

    def look(*arguments: object) -> str:
        bars = transformers_logging.is_progress_bar_enabled()
        seen.append((transformers_logging.get_verbosity(), bars))
        raise KeyboardInterrupt

    before = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    monkeypatch.setattr(export, "export_half", look)
    result = CliRunner().invoke(cli.app, ["export", str(folder / "float"), str(tmp_path / "half")])
    assert result.exit_code == 130
    assert seen == [(logging.ERROR, False)]
    after = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    assert after == before


def test_library_functions_leave_the_logging_of_transformers_alone() -> None:
    """But for the process of its own that an evaluation has."""
    source = Path(cli.__file__).parent
    names = ("set_verbosity", "disable_progress_bar")
    found = [
        str(path.relative_to(source))
        for path in sorted(source.rglob("*.py"))
        if any(name in path.read_text(encoding="utf-8") for name in names)
    ]
    assert found == ["commands/running.py", "evaluation/evaluate.py", "text/hub.py"]


# ---- the program itself ------------------------------------------------------------------------


def test_command_line_lists_its_commands() -> None:
    output = CliRunner().invoke(cli.app, ["--help"]).output
    assert all(command in output for command in ("demo", "evaluate", "generate"))


def test_version() -> None:
    assert CliRunner().invoke(cli.app, ["--version"]).output == f"bkcore {bkcore.__version__}\n"
