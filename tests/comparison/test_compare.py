"""The command end to end, on a small text with small models."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from bkcore.cli import app
from bkcore.comparison import compare, language, synthetic
from bkcore.comparison.compare import Comparison, run_comparison
from bkcore.comparison.contestants import CONVOLUTION, GPT2, MAMBA, RESNET_BK
from bkcore.comparison.runs import Run
from bkcore.comparison.settings import LanguageSettings, SyntheticSettings
from bkcore.comparison.synthetic import by_distance, correct
from bkcore.comparison.tasks import TASKS, Examples
from bkcore.errors import InputError
from bkcore.model import LanguageModel

SMALL = Comparison(
    LanguageSettings(
        training_tokens=3 * 4 * 16,
        vocab_size=300,
        window=16,
        batch_size=4,
        width=32,
        layers=1,
        parameters=50_000,
    ),
    SyntheticSettings(
        steps=2, batch_size=4, test_sequences=8, width=32, layers=1, parameters=20_000
    ),
)
TIMES = {"seconds", "seconds_per_step", "tokens_per_second"}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    words = ["first", "second", "slow", "quick", "lonely"]
    lines = [f"the {words[i * i % 5]} electron hops to site {i * 7 % 11} .\n" for i in range(1000)]
    (folder / "train.txt").write_text("".join(lines))
    (folder / "valid.txt").write_text("".join(lines[:60]))
    return folder


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two language models, one of them with two seeds, and one task."""
    monkeypatch.setattr(language, "CONTESTANTS", {RESNET_BK: (0,), CONVOLUTION: (0, 1)})
    monkeypatch.setattr(synthetic, "CONTESTANTS", (CONVOLUTION, MAMBA))
    monkeypatch.setattr(synthetic, "TASKS", TASKS[:1])


def run(text: Path, output: Path, **options: Any) -> dict[str, Any]:
    with (output.parent / f"{output.name}.log").open("w") as log:
        return run_comparison(SMALL, text, output, Console(file=log), **options)


def without_times(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: row[key] for key in row if key not in TIMES} for row in rows]


def test_report_has_every_run_and_repeats(text: Path, tmp_path: Path) -> None:
    report = run(text, tmp_path / "one")

    assert report["unfinished"] == []
    found = [(row["contestant"], row["seed"]) for row in report["language"]]
    assert found == [("convolution", 0), ("convolution", 1), ("resnet_bk", 0)]
    core = report["language"][2]
    assert core["ci_low_pct"] <= core["change_pct"] <= core["ci_high_pct"]
    ratio = core["ppl_token"] / report["language"][0]["ppl_token"]
    assert core["change_pct"] == pytest.approx(100 * (ratio - 1))
    assert report["language"][1]["change_pct"] == 0  # against its own seed
    result = json.loads((tmp_path / "one/language/resnet_bk/seed0/result.json").read_text())
    nats, size = sum(result["scores"]["nll"]), result["protocol"]["evaluation"]["bytes"]
    assert core["ppl_byte"] == pytest.approx(math.exp(nats / size))
    assert core["training_tokens"] == 3 * 4 * 16
    assert report["protocol"]["language"]["evaluation"]["split"] == "valid"
    assert [row["contestant"] for row in report["synthetic"]] == ["convolution", "mamba"]
    for row in report["synthetic"]:
        assert 0 <= row["accuracy"] <= 1
        assert sum(each["answers"] for each in row["accuracy_by_distance"]) == row["answers"]
        assert row["answers"] == 8 * 16
    json.dumps(report)

    again = run(text, tmp_path / "two")
    for part in ("language", "synthetic"):
        assert without_times(again[part]) == without_times(report[part])


def test_runs_can_be_done_one_at_a_time(text: Path, tmp_path: Path) -> None:
    report = run(text, tmp_path / "runs", only="language/resnet_bk")
    assert [row["contestant"] for row in report["language"]] == ["resnet_bk"]
    assert "change_pct" not in report["language"][0]
    assert "language/convolution/seed0" in report["unfinished"]

    later = run(text, tmp_path / "runs", only="language/resnet_bk", seed=7)
    assert [row["seed"] for row in later["language"]] == [0, 7]
    assert later["language"][0] == report["language"][0]


def test_a_killed_run_continues_to_the_same_result(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    only = "language/resnet_bk"
    whole = run(text, tmp_path / "whole", only=only)["language"]

    def killed(*args: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(language, "score", killed)
        with pytest.raises(KeyboardInterrupt):
            run(text, tmp_path / "killed", only=only)
    steps = tmp_path / "killed" / "language/resnet_bk/seed0/steps.txt"
    trained = steps.read_text()
    assert without_times(run(text, tmp_path / "killed", only=only)["language"]) == without_times(
        whole
    )
    assert steps.read_text() == trained  # it did not train again


def test_other_settings_stop_before_training(text: Path, tmp_path: Path) -> None:
    run(text, tmp_path / "runs", only="language/resnet_bk")
    other = Comparison(LanguageSettings(training_tokens=5), SMALL.synthetic)
    with pytest.raises(InputError, match="training_tokens 192, now 5"):
        run_comparison(other, text, tmp_path / "runs", Console(quiet=True))
    assert not (tmp_path / "runs" / "language/convolution").exists()


def test_results_that_would_not_compare_stop_before_training(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(text, tmp_path / "runs", only="language/resnet_bk")
    other = tmp_path / text.name  # a text of the same name and sizes
    other.mkdir()
    for name in ("train.txt", "valid.txt"):
        (other / name).write_text((text / name).read_text().replace("electron", "neutrons"))
    monkeypatch.setattr(language, "train", None)
    with pytest.raises(
        InputError, match=r"cannot be compared with it: corpus_sha256 '.*name another"
    ):
        run(other, tmp_path / "runs", only="language/convolution")
    (other / "valid.txt").write_text((other / "valid.txt").read_text()[:2000])
    one = Comparison(replace(SMALL.language, window=2000, batch_size=1), SMALL.synthetic)
    with pytest.raises(InputError, match="the text is one window"):
        run_comparison(one, other, tmp_path / "one", Console(quiet=True), "language/convolution")


def test_a_name_that_nothing_has_is_refused(text: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"starts with 'nothing'; the runs are language/resnet_bk"):
        run(text, tmp_path / "runs", only="nothing")


def test_results_of_two_protocols_are_not_mixed(text: Path, tmp_path: Path) -> None:
    run(text, tmp_path / "runs", only="language/resnet_bk")
    path = tmp_path / "runs/language/resnet_bk/seed0/result.json"
    result = json.loads(path.read_text())
    result["protocol"]["evaluation"]["window"] = 17
    other = tmp_path / "runs/language/other/seed0"
    other.mkdir(parents=True)
    (other / "result.json").write_text(json.dumps(result))
    no_runs: list[Run] = []
    with pytest.raises(InputError, match="different protocols"):
        compare.report(tmp_path / "runs", no_runs)


def test_the_command_writes_the_report(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(language, "CONTESTANTS", {GPT2: (0,)})
    path = tmp_path / "report.json"
    arguments = ["compare", "--data", str(text), "--output", str(tmp_path / "runs")]
    arguments += ["--only", "language", "--tokens", "1", "--threads", "1", "--json", str(path)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "gpt2" in result.output
    assert "unfinished: synthetic/recall-convolution/seed0" in " ".join(result.output.split())
    report = json.loads(path.read_text())
    assert [row["contestant"] for row in report["language"]] == ["gpt2"]
    assert report["language"][0]["schedule"]["steps"] == 1


def test_accuracy_counts_right_answers_at_their_distance() -> None:
    labels = torch.tensor([[-100, -100, 3, -100], [-100, 1, -100, 2]])
    examples = Examples(torch.zeros(2, 4, dtype=torch.int64), labels, torch.zeros(2, 4).long())
    torch.manual_seed(0)
    model = LanguageModel(5, 8, 1, 4, num_experts=1, experts_per_token=1, expert_size=4)
    logits = model.eval()(examples.input_ids).logits
    expected = [
        int(logits[row, position].argmax()) == answer
        for row, position, answer in [(0, 1, 3), (1, 0, 1), (1, 2, 2)]
    ]
    assert correct(model, examples, 1).tolist() == expected

    right = torch.tensor([True, False, True, True])
    distance = torch.tensor([7, 15, 16, 100])
    assert by_distance(right, distance) == [
        {"from": 7, "to": 16, "answers": 2, "accuracy": 0.5},
        {"from": 16, "to": 32, "answers": 1, "accuracy": 1.0},
        {"from": 64, "to": 128, "answers": 1, "accuracy": 1.0},
    ]
