"""The command on short sequences: its points, its files, and what its growth means."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from bkcore import cli
from bkcore.bench import memory, plot, process_memory
from bkcore.bench.memory import KINDS, Point, growth, markdown_table, measure, report, table
from bkcore.errors import InputError

MODEL = {"vocab_size": 61, "d_model": 8, "n_layers": 1, "num_experts": 2, "expert_size": 8}


def points(power: float, kinds: tuple[str, ...] = KINDS) -> list[Point]:
    return [
        Point(kind, length, round(1e6 * (length / 1024) ** power), length * 1e-3)
        for kind in kinds
        for length in (1024, 2048, 4096, 8192, 16_384)
    ]


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_growth_is_the_power_of_n(power: float) -> None:
    for kind in KINDS:
        assert growth(points(power), kind, "peak_bytes") == pytest.approx(power, abs=1e-4)
        assert growth(points(power), kind, "seconds") == pytest.approx(1)
    assert growth(points(1)[:3], KINDS[0], "seconds") is None


def test_growth_leaves_out_what_is_short() -> None:
    bent = [Point(KINDS[0], 1024, 10**9, 1.0), *points(1)[2:5]]
    assert growth(bent, KINDS[0], "peak_bytes") == pytest.approx(1, abs=1e-4)


def test_tables_and_plot(tmp_path: Path) -> None:
    console = Console(record=True, width=100, quiet=True)
    console.print(table(points(1)))
    lines = markdown_table(points(1)).splitlines()
    assert len(lines) == 2 + 3 * 5
    assert lines[3] == "| training | 2,048 | 2 | 1.0 | 2.00 | 2.05 | 1,000 |"
    plot.draw_memory(points(1), tmp_path / "memory.svg")
    assert "linear in N" in (tmp_path / "memory.svg").read_text()
    content = json.loads(json.dumps(report(points(1))))
    assert len(content["points"]) == 15
    assert content["growth"]["evaluation"]["peak_bytes"] == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_point_is_what_a_step_needs(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The step is run, and its peak, here a made-up one, is counted from the warm-up on."""
    lengths: list[int] = []
    step = memory._step

    def recorded(model: Any, kind: str) -> Callable[[torch.Tensor], object]:
        run = step(model, kind)
        weights = model.embedding.weight.detach().clone()

        def counted(tokens: torch.Tensor) -> None:
            lengths.append(len(tokens))
            run(tokens)
            changed = not torch.equal(weights, model.embedding.weight)
            assert changed is kind.startswith("training")
            assert model.layers[0].gradient_checkpointing is (kind == "training, checkpointed")

        return counted

    monkeypatch.setattr(memory, "MODEL", MODEL)
    monkeypatch.setattr(memory, "_step", recorded)
    monkeypatch.setattr(memory, "peak_bytes", lambda: 1000 * len(lengths))
    monkeypatch.setattr(memory, "keep_freed_memory", lambda: None)
    point = measure(kind, 200, torch.get_num_threads())
    assert lengths == [64, 200, 200, 200]
    assert (point.kind, point.length, point.peak_bytes) == (kind, 200, 3000)
    assert point.seconds > 0


def test_the_peak_rises_by_what_is_touched_and_never_falls() -> None:
    code = (
        "from bkcore.bench.process_memory import peak_bytes as peak; start = peak(); "
        "block = b'x' * 2**28; top = peak(); del block; print(top - start, peak() - top)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    rise, change = map(int, done.stdout.split())
    assert 0.9 * 2**28 < rise < 1.1 * 2**28
    assert abs(change) < 2**22  # the system counts pages in lots


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One point in a process of its own, and the rest made up."""
    real = memory._measure_in_new_process
    asked: list[tuple[str, int]] = []

    def once(kind: str, length: int) -> Point:
        asked.append((kind, length))
        return real(kind, 16) if len(asked) == 1 else Point(kind, length, 10**6, 1.0)

    monkeypatch.setattr(memory, "_measure_in_new_process", once)
    monkeypatch.setattr(cli, "keep_freed_memory", lambda: None)
    target = tmp_path / "new" / "memory.json"
    arguments = ["--json", str(target), "--plot", str(tmp_path / "memory.png")]
    arguments += ["--markdown", str(tmp_path / "memory.md"), "--longest", "2048"]
    monkeypatch.setattr(sys, "argv", ["bkcore", "bench", "memory", *arguments])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert not end.value.code
    assert asked == [(kind, length) for length in (1024, 2048) for kind in KINDS]
    content = json.loads(target.read_text())
    assert content["points"][0]["seconds"] > 0
    assert (tmp_path / "memory.png").stat().st_size > 0
    assert "| training |" in (tmp_path / "memory.md").read_text()


def test_what_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="at least 1024"):
        memory.run_memory(Console(quiet=True), 1000)
    monkeypatch.setattr(process_memory, "_STATUS", tmp_path / "status")
    with pytest.raises(InputError, match="only Linux"):
        memory.run_memory(Console(quiet=True), 2048)
