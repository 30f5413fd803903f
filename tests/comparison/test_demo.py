"""The demo end to end, on a small text with a small model."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from bkcore import outputs as files
from bkcore.cli import app
from bkcore.comparison import demo
from bkcore.comparison.demo import DemoSettings, run_demo
from bkcore.errors import CheckpointError, DataError, InputError
from bkcore.evaluation import checkpoints, evaluate, rows
from bkcore.model import LanguageModel
from bkcore.text import Corpus, load_corpus
from bkcore.training import Schedule

MODES = ["float32", "ptq_int8", "qat_int8", "ptq_int4", "qat_int4", "mixed_precision"]
FIELDS = {
    *("mode", "ppl_token", "ppl_word", "delta_pct", "ci_low_pct", "ci_high_pct", "ppl_byte"),
    *("kl_nats", "kl_tokens", "bytes", "size_ratio", "tokens_per_second", "speedup"),
}
TIMES = {"tokens_per_second", "speedup"}
SMALL = DemoSettings(
    vocab_size=400,
    window=32,
    batch_size=4,
    model={"d_model": 32, "n_layers": 1, "num_experts": 4, "expert_size": 64},
    training=Schedule(steps=40, batch_size=4, learning_rate=1e-2),
    qat_steps=4,
)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    sentence = "the {} electron hops to site {} and back again .\n"
    words = ["first", "second", "slow", "quick", "lonely"]
    lines = [sentence.format(words[i * i % 5], i * 7 % 11) for i in range(1200)]
    (folder / "train.txt").write_text("".join(lines))
    (folder / "valid.txt").write_text("".join(lines[:200]))
    return folder


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """A new interpreter for each checkpoint takes seconds; one test of it is enough."""
    monkeypatch.setattr(demo, "evaluate_in_new_process", evaluate.evaluate_checkpoint)


def run(text: Path, output: Path) -> dict[str, Any]:
    with (output.parent / f"{output.name}.log").open("w") as log:
        return run_demo(load_corpus(text), output, Console(file=log), SMALL)


def without_times(report: dict[str, Any]) -> list[dict[str, Any]]:
    rows = [*report["rows"], report["control"]]
    return [{k: v for k, v in row.items() if k not in TIMES} for row in rows]


@pytest.fixture(scope="module")
def finished(text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Folder and report of a demo."""
    folder = tmp_path_factory.mktemp("demo") / "one"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "evaluate_in_new_process", evaluate.evaluate_checkpoint)
        return folder, run(text, folder)


def test_report_has_every_mode(finished: tuple[Path, dict[str, Any]]) -> None:
    output, report = finished
    rows = report["rows"]

    assert [row["mode"] for row in rows] == MODES
    assert all(set(row) == FIELDS for row in rows)
    assert rows[0]["delta_pct"] == 0
    assert rows[0]["size_ratio"] == rows[0]["speedup"] == 1
    # It learned something: 40 steps on this text leave far less than the vocabulary's 400.
    assert rows[0]["ppl_token"] < 100
    for row in rows[1:]:
        assert row["ci_low_pct"] <= row["delta_pct"] <= row["ci_high_pct"]
        assert row["size_ratio"] > 1
        files = ("model.safetensors", "config.json", "generation_config.json")
        folder = output / row["mode"]
        assert row["bytes"] == sum((folder / file).stat().st_size for file in files)
    json.dumps(report)


@pytest.mark.slow
@pytest.mark.usefixtures("in_this_process")
def test_it_repeats(text: Path, finished: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    assert without_times(run(text, tmp_path / "two")) == without_times(finished[1])


def test_evaluate_agrees_with_the_demo(text: Path, finished: tuple[Path, dict[str, Any]]) -> None:
    output, report = finished
    setting = evaluate.Setting((text / "valid.txt").read_text(), "valid", 32, 4, 1)
    found = evaluate.evaluate_in_new_process(output / "ptq_int8", setting)
    row = rows.row("ptq_int8", found, found)
    assert row["ppl_token"] == report["rows"][1]["ppl_token"]


@pytest.mark.slow
def test_missing_checkpoint_is_an_error_of_the_parent_process(tmp_path: Path) -> None:
    setting = evaluate.Setting("some text", "valid", 32, 4, 1)
    with pytest.raises(CheckpointError, match="no checkpoint folder"):
        evaluate.evaluate_in_new_process(tmp_path / "nothing", setting)


def test_a_text_that_is_too_small_stops_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "train", None)
    few = Corpus("few", "the slow electron hops . " * 400, "and back again . " * 100)
    large = replace(SMALL, batch_size=400)
    with pytest.raises(DataError, match="the demo needs at least"):
        run_demo(few, tmp_path / "out", Console(quiet=True), large)
    assert not (tmp_path / "out").exists()


def test_a_text_of_one_window_stops_before_training(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = (text / "train.txt").read_text().splitlines(keepends=True)
    (tmp_path / "train.txt").write_text("".join(lines))
    (tmp_path / "valid.txt").write_text("".join(lines[:50]))
    monkeypatch.setattr(demo, "train", None)
    long = replace(SMALL, window=1000, batch_size=1)
    with pytest.raises(InputError, match="the text is one window"):
        run_demo(load_corpus(tmp_path), tmp_path / "out", Console(quiet=True), long)
    assert not (tmp_path / "out").exists()


def test_failed_json_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    files.write_json({"rows": []}, path)
    with pytest.raises(TypeError):
        files.write_json({"rows": object()}, path)
    assert json.loads(path.read_text()) == {"rows": []}
    assert list(tmp_path.iterdir()) == [path]


def test_command_line_says_what_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from bkcore import cli

    monkeypatch.setattr("sys.argv", ["bkcore", "demo", "--data", str(tmp_path / "nowhere")])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    assert "there is no folder" in " ".join(capsys.readouterr().err.split())


def test_generate_continues_a_text(finished: tuple[Path, dict[str, Any]]) -> None:
    output, _ = finished
    for mode in ("float32", "qat_int4"):
        result = CliRunner().invoke(
            app, ["generate", str(output / mode), "--prompt", "the slow", "--tokens=8"]
        )
        assert result.exit_code == 0, result.output
        assert result.output.startswith("the slow")
        assert len(result.output) > len("the slow\n")


def test_a_checkpoint_without_tokenizer_says_so(tmp_path: Path) -> None:
    LanguageModel(300, 16, 1, 16, num_experts=2, expert_size=8).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json"):
        checkpoints.load_checkpoint(tmp_path)


def test_names_that_cannot_be_written_stop_before_training(text: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be used as a folder"):
        run(text, tmp_path / "file")
    with pytest.raises(InputError, match="is a folder"):
        files.prepare_file(tmp_path)
    with pytest.raises(InputError, match="cannot be used as a folder"):
        files.prepare_file(tmp_path / "file" / "report.json")
