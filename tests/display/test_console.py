"""What is printed: values as they are, to streams that are full, closed or of few letters."""

from __future__ import annotations

import ast
import io
import os
from pathlib import Path

import pytest
import rich.console
from rich.table import Table

from bkcore.commands import demo, evaluate
from bkcore.comparison.demo import CONTROL
from bkcore.display.console import Console, LastingStream, bits_per_byte, number, say, visible
from bkcore.display.progress import Plan

SOURCE = Path(__file__).parents[2] / "src" / "bkcore"
NASTY = "[red]a[/red] [/b] [lr=1e-3] :smile: \\[x]"


def printed(*things: object) -> str:
    file = io.StringIO()
    console = Console(file=file, width=200, force_terminal=False)
    for thing in things:
        console.print(thing)
    return file.getvalue()


def test_brackets_are_brackets_everywhere() -> None:
    table = Table(title=f"title {NASTY}", caption=f"caption {NASTY}")
    table.add_column(f"column {NASTY}")
    table.add_row(f"cell {NASTY}")
    found = printed(NASTY, table)
    assert found.count(NASTY) == 5
    for part in ("title", "caption", "column", "cell"):
        assert f"{part} {NASTY}" in found


@pytest.mark.parametrize("kind", [Console, rich.console.Console])
@pytest.mark.parametrize("terminal", [True, False])
def test_lines_and_stages_are_printed_as_they_are(kind: type, terminal: bool) -> None:
    """On consoles of the caller's, too."""
    file = io.StringIO()
    console = kind(file=file, width=200, force_terminal=terminal, no_color=True)
    say(console, f"line {NASTY} " + "x" * 300)
    with Plan({NASTY: 1.0}, console) as plan, plan.stage(NASTY) as advance:
        advance(0.5, f"known {NASTY}")
    text = file.getvalue()
    assert f"line {NASTY} " + "x" * 300 + "\n" in text
    assert f"[1/1] {NASTY}: known {NASTY}, 0 s" in text


def test_what_would_steer_a_terminal_is_shown() -> None:
    name = "a\x1b[31mb\rc\udcffd\x9bd\ne\tf"
    assert visible(name) == "a\\x1b[31mb\\rc\\udcffd\\x9bd\ne\tf"
    assert "\\x1b[31mb" in printed(name)
    assert visible("± 漢字 é") == "± 漢字 é"


@pytest.mark.parametrize(
    ("value", "form", "expected"),
    [
        (1.234, ".2f", "1.23"),
        (-1.234, "+.1f", "-1.2"),
        (float("inf"), ".2f", "-"),
        (float("nan"), "+.2f", "-"),
        (None, ".2f", "-"),
        (99_999.4, ".1f", "99999.4"),
        (8.4e7, ".1f", "8e+07"),
        (8.4e7, "+.1f", "+8e+07"),
        (8.4e7, ".2e", "8.40e+07"),
    ],
)
def test_numbers(value: float | None, form: str, expected: str) -> None:
    assert number(value, form) == expected


def test_bits_of_a_byte() -> None:
    assert bits_per_byte(2.0**1.5) == "1.500"
    assert bits_per_byte(2.0**1.5, ".1f") == "1.5"
    assert bits_per_byte(float("inf")) == bits_per_byte(None) == "-"


@pytest.mark.parametrize("kl", [0.00081, 0.4123, float("inf"), float("nan")])
@pytest.mark.parametrize("speed", [3_414.0, 98_765.0, 134_149.0])
def test_the_table_of_the_demo_has_room_in_80_columns(kl: float, speed: float) -> None:
    row = {
        **{"ppl_token": 138.02, "ppl_byte": 2**1.904, "delta_pct": 1.76, "kl_nats": kl},
        **{"ci_low_pct": -1.7, "ci_high_pct": 1.83, "bytes": 20.98e6, "size_ratio": 7.52},
        **{"tokens_per_second": speed, "speedup": 1.96},
    }
    names = ["float32", "ptq_int8", "mixed_precision"]
    report = {
        "rows": [{"mode": name, **row} for name in names],
        "control": {"mode": CONTROL, **row},
        "protocol": {"corpus": "text", "split": "valid", "tokens": 362_196},
    }
    file = io.StringIO()
    Console(file=file, width=80).print(demo.table(report))
    lines = [line.rstrip() for line in file.getvalue().splitlines()]
    assert max(map(len, lines)) <= 80
    assert "…" not in file.getvalue()
    assert "inf" not in file.getvalue().replace("interval", "")
    mixed = next(line for line in lines if line.startswith("mixed_precision "))
    assert " 1.90 " in mixed
    assert "-1.70 to +1.83" in mixed
    assert any(line.startswith(f"{CONTROL} ") for line in lines)


def test_the_summary_of_an_evaluation_has_no_infinities() -> None:
    result = {
        **{"mode": "x", "ppl_token": 300.0, "ppl_word": float("inf"), "ppl_byte": 4.0},
        **{"standard_error_nats": 0.01, "kl_nats": 0.1, "bytes": 10**6, "size_ratio": 2.0},
        **{"delta_pct": float("inf"), "ci_low_pct": 1.0, "ci_high_pct": float("inf")},
        **{"tokens_per_second": 100.0, "speedup": 1.0},
        "protocol": {"corpus": NASTY, "split": "valid", "tokens": 10, "window": 5},
    }
    text = printed(evaluate.summary(result))
    assert NASTY in text
    assert "inf" not in text
    lines = {" ".join(line.split()) for line in text.splitlines()}
    assert {"perplexity per word -", "bits per byte 2.000"} <= lines
    assert {"change from the reference, % -", "its 95 % interval, % +1.00 to -"} <= lines


# ---- streams --------------------------------------------------------------------------------


def test_what_an_encoding_has_no_letters_for_is_replaced() -> None:
    raw = io.BytesIO()
    stream = LastingStream(io.TextIOWrapper(raw, encoding="ascii"))
    Console(file=stream, width=40).print("12 ± 3 \udcff 漢")
    stream.flush()
    assert raw.getvalue().startswith(b"12 ? 3 \\udcff ?")
    assert stream.error is None


@pytest.mark.parametrize("kind", ["full", "closed pipe", "none"])
def test_a_stream_that_takes_no_more_ends_no_work(kind: str) -> None:
    if kind == "full":
        inner = open("/dev/full", "w", encoding="utf-8")  # noqa: SIM115
    elif kind == "closed pipe":
        reading, writing = os.pipe()
        os.close(reading)
        inner = os.fdopen(writing, "w", encoding="utf-8")
    else:
        inner = None
    stream = LastingStream(inner)
    console = Console(file=stream)
    with Plan({"work": 1.0}, console) as plan, plan.stage("work"):
        console.print("some words")
    stream.flush()
    assert isinstance(stream.error, BrokenPipeError if kind == "closed pipe" else OSError)
    if inner is not None:
        inner.close()  # flushes, as Python does at its end, and must not fail again


# ---- the whole source -----------------------------------------------------------------------


def test_nothing_is_printed_past_these_functions() -> None:
    """A `Console` of rich's, a column or a print of it takes brackets for markup."""
    found = []
    for path in sorted(SOURCE.rglob("*.py")):
        name = str(path.relative_to(SOURCE))
        source = path.read_text(encoding="utf-8")
        is_own = (
            "from bkcore.display.console import" in source and "rich.console import" not in source
        )
        for node in ast.walk(ast.parse(source)):
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            options = {keyword.arg for keyword in node.keywords}
            if (
                (called.endswith("console.print") and name not in SHOWING)
                or (called == "TextColumn" and "{" in ast.unparse(node) and "markup" not in options)
                or called in ("typer.echo", "rich.print", "Text.from_markup")
                or (called == "print" and name not in ("cli.py", "commands/generate.py"))
            ):
                found.append(f"{name}:{node.lineno} {called}")
            if called == "Console" and not (name in SHOWING and is_own):
                found.append(f"{name}:{node.lineno} {called}")
    assert not found


SHOWING = {
    "display/console.py",
    *(f"commands/{path.name}" for path in (SOURCE / "commands").glob("*.py")),
} - {"commands/quantize_steps.py"}
"""What is called with a `Console` of bkcore's, or prints what is no string."""
