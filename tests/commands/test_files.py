"""Outputs that are in each other's way, or would cost what is read, are refused before the work."""

from __future__ import annotations

import io
import math
import os
from pathlib import Path

import pytest
from rich.console import Console

from bkcore.commands.bit_budget_tables import draw_frontier
from bkcore.commands.files import Files, prepare_model, say_what_is_replaced
from bkcore.commands.train import draw_curve
from bkcore.errors import InputError, OutputError


def test_one_place_for_two_outputs_is_refused(tmp_path: Path) -> None:
    file, folder = tmp_path / "a", tmp_path / "runs"
    (tmp_path / "link").symlink_to("a")
    for other in (file, tmp_path / "runs" / ".." / "a", tmp_path / "link"):
        with pytest.raises(InputError, match="--json and --markdown are both"):
            Files(file, other).prepare()
    with pytest.raises(InputError, match="--json and --output are both"):
        Files(folder).prepare({"--output": folder})
    with pytest.raises(InputError, match=r"--json is .*, but --output needs a folder"):
        Files(file).prepare({"--output": file / "b"})
    Files(file).prepare({"--output": folder, "--control": None})
    Files(Path(os.devnull), Path(os.devnull)).prepare()
    assert {path.name for path in tmp_path.iterdir()} == {"link"}


@pytest.mark.parametrize("name", ["config.json", "receipt.json", "bkcore.json", "tokenizer.json"])
def test_a_file_of_a_model_is_no_place_for_a_report(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match=r"a file of the model in .*int8"):
        Files(tmp_path / "int8" / name).prepare({"OUTPUT": tmp_path / "int8"})
    Files(tmp_path / "int8" / "report.json").prepare({"OUTPUT": tmp_path / "int8"})


def test_what_is_read_is_not_replaced(tmp_path: Path) -> None:
    model, text = tmp_path / "model", tmp_path / "text"
    for folder in (model, text / "deep"):
        folder.mkdir(parents=True)
    names = ("model/config.json", "model/report.json", "text/deep/a.txt", "text/deep/b.json")
    for name in (*names, "recipe.yaml"):
        (tmp_path / name).touch()
    read: list[Path | str | None] = [model, str(text), tmp_path / "recipe.yaml", None]
    for name in ("model/config.json", "text/deep/a.txt", "recipe.yaml"):
        with pytest.raises(InputError, match="which is read; name another file"):
            Files(tmp_path / name).prepare(read=read)
    for name in ("model/report.json", "text/deep/b.json", "text/new.txt"):
        Files(tmp_path / name).prepare(read=read)


@pytest.mark.parametrize("content", ["[1]", "3", '{"quantization": 3}', "{", "\xff"])
def test_a_configuration_that_is_none_may_be_of_a_model(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(InputError, match="may hold a model"):
        prepare_model(tmp_path, tmp_path / "checkpoint")


@pytest.mark.filterwarnings("error")
def test_pictures_leave_out_what_is_not_finite(tmp_path: Path) -> None:
    entry = {"step": 1, "loss": 3.0, "eval_loss": 3.0, "eval_ppl_word": math.inf}
    recipe = {"schedule": {"batch_size": 4}, "window": 16}
    draw_curve({"recipe": recipe, "curve": [entry]}, tmp_path / "curve.svg")
    changes = (("saved", 1.0, 2.0), ("budget", math.inf, math.inf), ("ptq_int4", 5.0, math.nan))
    rows = [
        {"name": name, "bytes": 10, "delta_pct": delta, "ci_low_pct": 0.0, "ci_high_pct": high}
        for name, delta, high in changes
    ]
    draw_frontier(rows, tmp_path / "frontier.svg")
    picture = (tmp_path / "frontier.svg").read_text(encoding="utf-8")
    assert "saved" in picture
    assert "ptq_int4" not in picture


@pytest.mark.parametrize("name", ["loop", "n" * 300, "a\0b"])
def test_paths_that_cannot_be_are_refused_in_words(tmp_path: Path, name: str) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(InputError):
        Files(tmp_path / name).prepare()
    with pytest.raises(InputError):
        Files().prepare({"--output": tmp_path / name})


def test_every_other_file_is_written_when_one_cannot_be(tmp_path: Path) -> None:
    said: list[str] = []
    (tmp_path / "a").mkdir()
    files = Files(tmp_path / "a", tmp_path / "b", tmp_path / "c.svg")
    with pytest.raises(OutputError, match="a could not be written"):
        files.publish(
            lambda: said.append("shown"),
            {"one": 1},
            "two",
            lambda path: said.append(path.name),
        )
    assert said == ["c.svg", "shown"]
    assert (tmp_path / "b").read_text() == "two"


def test_folders_whose_models_will_be_replaced_are_named(tmp_path: Path) -> None:
    console = Console(record=True, file=io.StringIO(), width=1000)
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
    say_what_is_replaced(console, [tmp_path / "a", tmp_path / "d", None])
    assert console.export_text() == ""
    for name in ("a", "c"):
        (tmp_path / name / "config.json").touch()
    say_what_is_replaced(console, [tmp_path / name for name in "abcd"])
    both = f"{tmp_path / 'a'}, {tmp_path / 'c'} hold earlier models, to be replaced when the new"
    assert console.export_text().startswith(both)
