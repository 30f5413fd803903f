"""The benchmark of engines on small models: its rows, its files, and what it refuses to time."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from bkcore import cli
from bkcore.bench import engine_timing, engines, plot
from bkcore.bench.engine_costs import Cost, Pass
from bkcore.bench.engine_models import FORMATS, SIZES, Size, llama_of_size, own_model
from bkcore.bench.engine_rows import Row, Side, table
from bkcore.bench.engines import run_engines
from bkcore.bench.own_engine import OwnEngine
from bkcore.bench.rival_models import count_parameters
from bkcore.errors import BenchmarkError, InputError

QUIET = Console(quiet=True)
ROOT = Path(__file__).resolve().parents[2]
TINY = {"vocab_size": 64, "d_model": 64, "n_layers": 1, "num_heads": 2, "key_size": 8}
ONE = {"num_experts": 1, "experts_per_token": 1, "expert_size": 128}
LLAMA = {"width": 64, "layers": 1, "heads": 1, "cached_heads": 1}
THREADS = sorted({1, min(2, torch.get_num_threads())})


class FakeLlama:
    """A rival that only counts."""

    made: list[FakeLlama]

    def __init__(self, path: Path, length: int, flash_attention: bool) -> None:
        self.position, self.length = 0, length
        self.threads = 0
        self.contexts: set[int] = set()
        self.open = True
        self.made.append(self)

    def use_threads(self, count: int) -> None:
        self.threads = count

    def forget(self, position: int) -> None:
        assert position < self.position
        self.position = position
        self.contexts.add(position)

    def read(self, tokens: np.ndarray[Any, Any]) -> None:
        self._run(len(tokens))

    def greedy(self, first: int, steps: int) -> list[int]:
        self._run(steps)
        return [first] * steps

    def loop_seconds(self) -> float:
        return 5e-6

    def close(self) -> None:
        self.open = False

    def _run(self, count: int) -> None:
        assert self.threads in THREADS
        self.position += count
        assert self.position <= self.length


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = (
        Size("tiny", {"dense": {**TINY, **ONE}, "mixture": {**TINY, "expert_size": 16}}, LLAMA, 1),
        Size("other", {"mixture": {**TINY, "expert_size": 16}}, LLAMA, 1),
    )
    monkeypatch.setattr(engines, "SIZES", sizes)
    monkeypatch.setattr(engines, "AGED", ("other mixture", "INT8"))
    monkeypatch.setattr(engines, "CONTEXTS", (0, 8))
    monkeypatch.setattr(engines, "TOGETHER", 3)
    monkeypatch.setattr(engines, "YOUNG", 2)
    monkeypatch.setattr(engines, "OLD", 20)
    monkeypatch.setattr(engines, "_CALIBRATION", (2, 40))
    monkeypatch.setattr(engine_timing, "STEPS", 2)
    monkeypatch.setattr(engine_timing, "READ", 4)
    monkeypatch.setattr("bkcore.bench.timing.SECONDS", 1e-4)
    monkeypatch.setattr("bkcore.bench.timing._ROUNDS", 1)


@pytest.fixture
def fake_rival(monkeypatch: pytest.MonkeyPatch) -> type[FakeLlama]:
    FakeLlama.made = []
    monkeypatch.setattr(engines, "LlamaCpp", FakeLlama)
    monkeypatch.setattr(engines, "require_llama_cpp", lambda: None)
    monkeypatch.setattr(engines, "check_llama_cpp", lambda: None)
    monkeypatch.setattr(engines, "check_engine", lambda engine, model, form: None)
    monkeypatch.setattr(engines, "describe", lambda: {"llama-cpp-python": "0"})
    monkeypatch.setattr(engines, "write_gguf", lambda model, path, form: 1000)
    return FakeLlama


def test_every_row_without_a_rival() -> None:
    found = run_engines(QUIET, Path("none"), with_rival=False)
    expected = {
        (model, form, work, context, threads)
        for model in ("tiny dense", "tiny mixture", "other mixture")
        for form in ("float32", "INT8", "INT4")
        for threads in THREADS
        for work, context in (
            *((work, context) for work in ("decode", "read") for context in (0, 8)),
            ("together", 0),
        )
    }
    expected.add(("other mixture", "INT8", "late", 20, 1))
    rows = [(row.model, row.format, row.work, row.context, row.threads) for row in found.rows]
    assert set(rows) == expected
    assert len(rows) == len(expected)
    assert list(dict.fromkeys(row.model for row in found.rows)) == [
        "tiny dense",
        "tiny mixture",
        "other mixture",
    ]
    for row in found.rows:
        assert (row.other is None) == (row.work in ("decode", "read"))
        assert row.own.seconds > 0
        assert row.own.plain_read_seconds > 0
    together = next(row for row in found.rows if row.work == "together")
    assert together.other is not None
    assert together.own.bytes < together.other.bytes  # the weights are read once for all
    assert together.own.operations == together.other.operations
    assert found.rival is None
    assert [model["name"] for model in found.models] == [
        "tiny dense",
        "tiny mixture",
        "other mixture",
    ]


def test_the_faster_of_the_rivals_settings_counts(
    fake_rival: type[FakeLlama], monkeypatch: pytest.MonkeyPatch
) -> None:
    def later_is_faster(*calls: Callable[[], object]) -> tuple[float, ...]:
        for call in calls:
            call()
        return tuple(float(len(calls) - place) for place in range(len(calls)))

    monkeypatch.setattr(engine_timing, "interleaved", later_is_faster)
    found = run_engines(QUIET, Path("none"), "tiny")
    by_format = {form.own: form.rival for form in FORMATS}
    for row in found.rows:
        if row.work not in ("decode", "read"):
            continue
        if by_format[row.format] is None:
            assert row.other is None
            continue
        assert row.other is not None
        assert row.other.engine == f"llama.cpp {by_format[row.format]}"
        assert row.other.note == (
            "flash attention on; a decoded token's time includes 5.0 us of Python"
        )
        # Two models of ours, two settings of the rival, and four plain reads take 8 to 1 seconds.
        tokens = {"decode": 2, "read": 4}[row.work]
        first = 8 if row.model == "tiny dense" else 7
        assert row.own.seconds * tokens == first
        assert row.other.seconds * tokens == 5
        assert row.ratio == pytest.approx(5 / first)
        assert row.other.plain_read_seconds * {"decode": 1, "read": 4}[row.work] == 1
    assert len(fake_rival.made) == 4  # two formats, with and without flash attention
    assert all(rival.contexts == {0, 8} and not rival.open for rival in fake_rival.made)
    llama = found.models[-1]
    assert llama["name"] == "tiny Llama"
    assert abs(llama["parameters"] / found.models[0]["parameters"] - 1) < 0.2
    check_file(found.as_dict())


def check_file(report: dict[str, Any]) -> None:
    content = json.loads(json.dumps(report, allow_nan=False))
    assert set(content) == {"machine", "rival", "tokens_a_call", "models", "rows"}
    assert content["rival"] == {"llama-cpp-python": "0"}
    (row, *_) = (row for row in content["rows"] if row["format"] == "INT8")
    assert set(row) == {"model", "format", "work", "context", "threads", "own", "other", "ratio"}
    assert set(row["own"]) == set(row["other"])
    assert set(row["own"]) == {
        *("engine", "parameters", "seconds", "tokens_per_second", "bytes", "operations"),
        *("plain_read_seconds", "of_plain_read", "note"),
    }
    assert {"parameters", "active_parameters", "state_bytes"} < set(content["models"][0])


def test_times_are_of_a_token() -> None:
    """Of a call with many passes, and of a pass with many tokens."""
    work = Pass(0, sequences=4, tokens=5)
    timed = engine_timing.Timed("it", 9, lambda: None, work, Cost(200, 60), passes=2, note="so")
    side = timed.side(seconds=80.0, plain_read_seconds=10.0)
    assert side == Side("it", 9, 2.0, 10.0, 3.0, 0.5, "so")
    assert side.of_plain_read == 0.25
    assert side.tokens_per_second == 0.5


def side(engine: str, parameters: int, seconds: float) -> Side:
    return Side(engine, parameters, seconds, 5e6, 1e7, seconds / 4)


def made_up() -> list[Row]:
    """As long as rows can be."""
    return [
        Row(
            "100 M mixture",
            "float32",
            "together",
            0,
            2,
            side("64 sequences", 10**8, 1.2e-5),
            side("1 sequence", 10**8, 1.4e-4),
        ),
        *(
            Row(
                f"{millions} M {kind}",
                "INT8",
                "decode",
                512,
                1,
                side("bkcore INT8", millions * 10**6, millions * 1e-5),
                side("llama.cpp Q8_0", millions * 10**6, millions * 1e-4),
            )
            for millions, kind in ((5, "mixture"), (100, "mixture"), (100, "dense"))
        ),
        Row("5 M mixture", "INT8", "late", 1_000_000, 1, side("", 1, 1e-5), side("", 1, 1e-5)),
        Row("5 M mixture", "INT8", "read", 16_384, 1, side("bkcore INT8", 1, 1.0), None),
    ]


def test_the_table_fits_a_terminal() -> None:
    console = Console(record=True, width=80, file=StringIO())
    console.print(table(made_up()))
    text = console.export_text()
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= 80
    lines = [line.split() for line in text.splitlines()]
    beginning = ["many", "to", "one,", "at", "0", "float32", "2"]
    assert [*beginning, "83,333", "0.25", "7,143", "0.25", "11.7"] in lines
    assert ["read", "on", "at", "16,384", "INT8", "1", "1", "0.25"] in lines


def test_the_picture(tmp_path: Path) -> None:
    plot.draw_engines(made_up(), tmp_path / "engines.svg")
    drawn = (tmp_path / "engines.svg").read_text(encoding="utf-8")
    for name in ("bkcore INT8", "bkcore INT8, dense", "llama.cpp Q8_0"):
        assert f"<!-- {name} -->" in drawn
    plot.draw_engines([], tmp_path / "none.png")
    assert (tmp_path / "none.png").stat().st_size > 0


def test_an_unknown_size_is_refused() -> None:
    with pytest.raises(InputError, match="the sizes are tiny, other"):
        run_engines(QUIET, Path("none"), "huge")


def test_a_missing_rival_is_not_left_out_in_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"llama_cpp and gguf cannot be imported; .*--no-rivals"):
        run_engines(QUIET, Path("none"))


def test_wrong_logits_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    true = OwnEngine.read

    def forgetful(self, text, tokens):
        return true(self, self.start(), tokens)

    monkeypatch.setattr(OwnEngine, "read", forgetful)
    with pytest.raises(BenchmarkError, match="logits of tiny dense after token 1 differ"):
        run_engines(QUIET, Path("none"), with_rival=False)


def test_wrong_tokens_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def constant(self, text, first, steps):
        return np.full((1, steps), -1, np.int64)

    monkeypatch.setattr(OwnEngine, "greedy", constant)
    with pytest.raises(BenchmarkError, match="does not write its likeliest token"):
        run_engines(QUIET, Path("none"), with_rival=False)


def test_the_models_of_a_size_have_as_many_parameters() -> None:
    for size in SIZES:
        with torch.device("meta"):
            counts = [
                count_parameters(own_model(options, Path("none")))
                for options in size.own.values()
                if options is not None
            ]
        if not counts:
            continue
        with torch.device("meta"):
            vocab_size = next(iter(size.own.values()))["vocab_size"]  # type: ignore[index]
            counts.append(count_parameters(llama_of_size(size.llama, vocab_size, counts[0])))
        assert max(counts) / min(counts) < 1.02
        assert abs(counts[0] / (float(size.name.split()[0]) * 1e6) - 1) < 0.03


def test_the_shipped_model_has_a_llama_of_its_size() -> None:
    (size,) = (size for size in SIZES if size.name == "4.9 M")
    model = own_model(size.own["shipped"], ROOT / "checkpoints/wikitext2")
    llama = llama_of_size(size.llama, model.config.vocab_size, count_parameters(model))
    assert abs(count_parameters(llama) / count_parameters(model) - 1) < 0.02
    assert llama.config.intermediate_size % 32 == 0


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "keep_freed_memory", lambda: None)
    monkeypatch.chdir(tmp_path)
    files = ["--json", "engines.json", "--plot", "engines.svg"]
    monkeypatch.setattr(
        sys, "argv", ["bkcore", "bench", "engines", "--no-rivals", "--only", "other", *files]
    )
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert not end.value.code
    assert json.loads((tmp_path / "engines.json").read_text())["rival"] is None
    assert (tmp_path / "engines.svg").stat().st_size > 0
