"""The pages of the documentation: their code blocks run, as a reader would paste them, their
commands have the options that they are called with, their tables are those of the measurements,
and their links lead somewhere."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer

from bkcore.cli import app
from docs.pages import BLOCK, ROOT, pages, run_blocks
from docs.tables import MARKED, TABLES, engine_costs, engine_speeds, with_tables

PAGES = pages()
# Made when the site is built, where `mkdocs build --strict` looks after the links.
MADE = {"commands.md", "disordered-chain.svg"}
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


@each_page
def test_blocks_run(page: Path, tmp_path: Path) -> None:
    (tmp_path / "checkpoints").symlink_to(ROOT / "checkpoints")  # as in a clone
    run_blocks(page, tmp_path)


def test_there_is_something_to_run() -> None:
    assert sum(len(BLOCK.findall(page.read_text())) for page in PAGES) > 10


def test_pages_are_found_in_folders() -> None:
    assert ROOT / "docs/tutorials/disordered-chain.md" in PAGES


def commands(page: Path) -> list[list[str]]:
    """The calls of `bkcore` in indented blocks, as arguments."""
    lines = re.sub(r"\\\n\s*", "", page.read_text()).splitlines()
    found = [line.strip() for line in lines if re.match(r"    (torchrun .* -m )?bkcore ", line)]
    return [shlex.split(line.partition("bkcore ")[2].rstrip(" &"), comments=True) for line in found]


@each_page
def test_commands_can_be_called_so(page: Path) -> None:
    group = typer.main.get_command(app)
    for arguments in commands(page):
        command: Any = group
        context = typer.Context(group)
        while hasattr(command, "commands"):
            name, command, arguments = command.resolve_command(context, arguments)
        command.make_context(name, list(arguments))  # refuses what it does not know


def test_commands_are_found() -> None:
    tutorial = commands(ROOT / "docs/tutorials/quantize-and-judge.md")
    assert ["generate", "runs/int4", "--prompt", " The river rises in"] in tutorial
    assert sum(len(commands(page)) for page in PAGES) > 20


@each_page
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text())
    missing = [
        target
        for target in targets
        if Path(target).name not in MADE and not (page.parent / target).exists()
    ]
    assert not missing


@each_page
def test_tables_are_those_of_the_measurements(page: Path) -> None:
    """`make tables` writes them."""
    text = page.read_text()
    assert with_tables(text) == text


def test_every_table_stands_on_a_page() -> None:
    placed = {name for page in PAGES for name, _ in MARKED.findall(page.read_text())}
    assert placed == set(TABLES)


def test_a_table_that_was_typed_is_found_out() -> None:
    typed = "<!-- table: widths -->\n\n| typed |\n\n<!-- end of table -->\n"
    assert with_tables(typed) == typed.replace("| typed |\n", TABLES["widths"]())


def engine_side(engine: str, seconds: float) -> dict[str, Any]:
    return {
        "engine": engine,
        "parameters": 4_890_000,
        "seconds": seconds,
        "tokens_per_second": 1 / seconds,
        "bytes": 2_500_000,
        "operations": 4_000_000,
        "of_plain_read": 0.125,
    }


def engine_row(form: str, work: str, context: int, other: float | None) -> dict[str, Any]:
    return {
        "model": "4.9 M shipped",
        "format": form,
        "work": work,
        "context": context,
        "threads": 1,
        "own": engine_side(f"bkcore {form}", 1e-4),
        "other": None if other is None else engine_side("llama.cpp Q8_0", other),
        "ratio": None if other is None else other / 1e-4,
    }


def test_the_tables_of_engines() -> None:
    """From made-up figures, of a run that left out a format's rival."""
    rows = [
        engine_row("float32", "decode", 0, None),
        engine_row("float32", "decode", 512, None),
        engine_row("INT8", "decode", 0, 3.5e-4),
        engine_row("INT8", "decode", 512, 5e-4),
        engine_row("INT8", "together", 0, 8e-4),
    ]
    report = {"rows": rows}
    assert engine_speeds(report, "decode").splitlines() == [
        "| model | format | threads | at 0 | at 512 |",
        "| --- | --- | ---: | ---: | ---: |",
        "| 4.9 M shipped | float32 | 1 | 10,000 | 10,000 |",
        "| 4.9 M shipped | INT8 | 1 | 10,000 (3.5) | 10,000 (5.0) |",
    ]
    assert engine_costs(report).splitlines()[2:] == [
        "| 4.9 M shipped | bkcore float32 | 2.50 | 4.0 | 100 | 0.12 |",
        "| 4.9 M shipped | bkcore INT8 | 2.50 | 4.0 | 100 | 0.12 |",
        "| Llama, 4.9 M | llama.cpp Q8_0 | 2.50 | 4.0 | 500 | 0.12 |",
    ]
    assert engine_speeds(report, "together").splitlines() == [
        "| model | format | threads | at 0 |",
        "| --- | --- | ---: | ---: |",
        "| 4.9 M shipped | INT8 | 1 | 10,000 (8.0) |",
    ]


def test_what_was_copied_names_its_command_and_date() -> None:
    files = [json.loads(path.read_text()) for path in (ROOT / "docs/data").rglob("*.json")]
    copied = [content for content in files if content.get("transcribed")]
    assert all(each["command"] and each["date"] for each in copied)


@pytest.mark.parametrize("page", PAGES[1:], ids=lambda page: str(page.relative_to(ROOT)))
def test_lines_are_short(page: Path) -> None:
    """Of tables, a row is a line. The README is written for another place."""
    lines = page.read_text().splitlines()
    assert [n for n, line in enumerate(lines, 1) if len(line) > 100 and line[:1] != "|"] == []


def test_the_picture_shows_the_figures_of_the_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib import pyplot as plt

    from docs import picture, tables

    report, read = tables.data("engines"), tables.data
    costs = [line.split("|") for line in tables.engine_costs(report).splitlines()[2:]]
    others = [{**row, "threads": 3, "own": {**row["own"], "seconds": 77}} for row in report["rows"]]
    more = {**report, "rows": report["rows"] + others}
    monkeypatch.setattr(tables, "data", lambda name: more if name == "engines" else read(name))
    figure, (left, right) = plt.subplots(1, 2)
    picture.speed(right)
    picture.quality(left)
    drawn = {
        (str(line.get_label()).removesuffix(", dense"), f"{1e6 / speed:,.0f}")
        for line in right.lines
        for speed in np.asarray(line.get_ydata())
    }
    timed = {(cells[2].strip(), cells[5].strip()) for cells in costs}
    assert drawn <= timed
    assert len({engine for engine, _ in drawn}) == 4
    plotted = [round(float(line.get_xdata()[0]), 2) for line in left.lines]
    sizes = [float(line.split("|")[2]) for line in tables.overview().splitlines()[2:]]
    assert {*sizes, round(4 * tables.shipped()["parameters"] / 1e6, 2)} <= set(plotted)
    plt.close(figure)
