"""Outputs that are in each other's way, or would cost what is read, are refused before the work."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest

from bkcore.commands.bit_budget_tables import draw_frontier
from bkcore.commands.files import prepare, refuse_model
from bkcore.commands.train import draw_curve
from bkcore.errors import InputError


def test_one_place_for_two_outputs_is_refused(tmp_path: Path) -> None:
    file, folder = tmp_path / "a", tmp_path / "runs"
    (tmp_path / "link").symlink_to("a")
    for other in (file, tmp_path / "runs" / ".." / "a", tmp_path / "link"):
        with pytest.raises(InputError, match="--json and --plot are both"):
            prepare({"--json": file, "--plot": other})
    with pytest.raises(InputError, match="--json and --output are both"):
        prepare({"--json": folder}, {"--output": folder})
    with pytest.raises(InputError, match=r"--json is .*, but --output needs a folder"):
        prepare({"--json": file}, {"--output": file / "b"})
    prepare({"--json": file, "--plot": None}, {"--output": folder, "--control": None})
    prepare({"--json": Path(os.devnull), "--markdown": Path(os.devnull)})
    assert {path.name for path in tmp_path.iterdir()} == {"link"}


@pytest.mark.parametrize("name", ["config.json", "receipt.json", "bkcore.json", "tokenizer.json"])
def test_a_file_of_a_model_is_no_place_for_a_report(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match=r"a file of the model in .*int8"):
        prepare({"--json": tmp_path / "int8" / name}, {"OUTPUT": tmp_path / "int8"})
    prepare({"--json": tmp_path / "int8" / "report.json"}, {"OUTPUT": tmp_path / "int8"})


def test_what_is_read_is_not_replaced(tmp_path: Path) -> None:
    model, text = tmp_path / "model", tmp_path / "text"
    for folder in (model, text / "deep"):
        folder.mkdir(parents=True)
    names = ("model/config.json", "model/report.json", "text/deep/a.txt", "text/deep/b.json")
    for name in (*names, "recipe.yaml"):
        (tmp_path / name).touch()
    read = [model, str(text), tmp_path / "recipe.yaml", None]
    for name in ("model/config.json", "text/deep/a.txt", "recipe.yaml"):
        with pytest.raises(InputError, match="which is read; name another file"):
            prepare({"--json": tmp_path / name}, read=read)
    for name in ("model/report.json", "text/deep/b.json", "text/new.txt"):
        prepare({"--json": tmp_path / name}, read=read)


@pytest.mark.parametrize("content", ["[1]", "3", '{"quantization": 3}', "{", "\xff"])
def test_a_configuration_that_is_none_may_be_of_a_model(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(InputError, match="may hold a model"):
        refuse_model(tmp_path)


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
        prepare({"--json": tmp_path / name})
    with pytest.raises(InputError):
        prepare({}, {"--output": tmp_path / name})
