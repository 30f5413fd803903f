"""The command on small shapes: its rows, its files, and that a wrong kernel gets no speed."""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from bkcore import cli
from bkcore.bench import kernels, rival_solvers, timing
from bkcore.bench.kernels import CASES, run_kernels
from bkcore.bench.machine import machine
from bkcore.bench.result import Result, markdown_table, report, table
from bkcore.bench.settings import KERNEL_SECONDS
from bkcore.display import plots
from bkcore.errors import BackendError, BenchmarkError, InputError
from bkcore.host import last_level_cache
from bkcore.kernels import use_backend
from bkcore.kernels.backends import cpu, selection
from bkcore.kernels.backends.interface import Sweep, SweepBackward, SweepCodes, SweepStep
from bkcore.processes import ProcessDiedError

FIELDS = {
    *("name", "shape", "threads", "seconds", "baseline", "baseline_seconds"),
    *("ratio", "target", "met"),
}
QUICK = [case.name for case in CASES if case.name not in ("comparison", "fresh memory")]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "SECONDS", 0.0)
    monkeypatch.setattr(kernels, "last_level_cache", lambda: 1000)
    monkeypatch.setattr(kernels, "usable_cores", lambda: 2)
    shapes = {"LARGE": ((2, 30, 17),), "IN_CACHE": (1, 20, 5), "ONE_LANE": (1, 50, 1)}
    lengths = {"SHORT": (8, 10, 4), "LONG": (1, 80, 4), "ONE_TOKEN": (1, 1, 9)}
    layouts = {"LAYOUT_ELEMENTS": 2**10, "LAYOUT_LANES": (1, 3, 17), "LAYOUT_BATCHES": (16,)}
    for name, value in {**shapes, **lengths, **layouts}.items():
        monkeypatch.setattr(kernels, name, value)
    monkeypatch.setattr(rival_solvers, "SITES", (8, 16))
    monkeypatch.setattr(rival_solvers, "SCAN_SITES", ())


def quiet() -> Console:
    return Console(quiet=True)


def run_command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Exit code of `bkcore bench kernels` with these arguments."""
    monkeypatch.setattr(cli, "keep_freed_memory", lambda: None)
    monkeypatch.setattr(sys, "argv", ["bkcore", "bench", "kernels", *arguments])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return int(end.value.code or 0)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_rows(case: kernels.Case) -> None:
    threads = torch.get_num_threads()
    seen: list[Result] = []
    results = run_kernels(quiet(), case.name, seen.append)
    assert results
    assert seen == results
    assert {result.threads for result in results} == ({2} if case.name == "comparison" else {1, 2})
    for result in results:
        row = result.as_dict()
        assert set(row) - {"note"} == FIELDS
        assert row["name"].startswith(case.name)
        assert row["ratio"] == row["baseline_seconds"] / row["seconds"]
        assert row["met"] == (None if row["target"] is None else row["ratio"] >= row["target"])
    assert torch.get_num_threads() == threads
    json.dumps(report(results))


def test_large_shapes_outgrow_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "last_level_cache", lambda: 10**6)
    ((batch, sites, lanes),) = kernels.large_shapes()
    assert 3 * 10**6 <= 12 * batch * sites * lanes < 4 * 10**6


def broken_forward(args: Sweep) -> torch.Tensor:
    parts = cpu.BACKEND.sweep(args)
    parts[-1, -1, -1, -1] *= 1.01
    return parts


def broken_backward(args: SweepBackward) -> tuple[torch.Tensor | None, ...]:
    dv, *others = cpu.BACKEND.sweep_backward(args)
    dv[-1, -1, -1] += 1
    return dv, *others


def broken_step(args: SweepStep) -> None:
    cpu.BACKEND.sweep_step(args)
    args.state[-1, -1, -1] *= 1.01


def broken_codes(args: SweepCodes) -> torch.Tensor:
    codes = cpu.BACKEND.sweep_codes(args)
    codes[-1, -1, -1, -1] ^= 1
    return codes


def break_backend(monkeypatch: pytest.MonkeyPatch, **changes: Callable[..., object]) -> None:
    broken = replace(cpu.BACKEND, **changes)  # type: ignore[arg-type]
    monkeypatch.setitem(selection._BACKENDS, "cpu", broken)


@pytest.mark.parametrize("name", [*(name for name in QUICK if name != "backward"), "comparison"])
def test_a_wrong_sweep_is_not_timed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    break_backend(monkeypatch, sweep=broken_forward, sweep_step=broken_step)
    seen: list[Result] = []
    with pytest.raises(BenchmarkError, match="wrong result"):
        run_kernels(quiet(), name, seen.append)
    assert not seen


@pytest.mark.parametrize("name", ["backward", "growth"])
def test_a_wrong_gradient_is_not_timed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    break_backend(monkeypatch, sweep_backward=broken_backward)
    seen: list[Result] = []
    with pytest.raises(BenchmarkError, match=r"wrong result.*gradient 0"):
        run_kernels(quiet(), name, seen.append)
    assert not any("backward" in result.name for result in seen)


def test_a_wrong_code_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    break_backend(monkeypatch, sweep_codes=broken_codes)
    monkeypatch.setattr(kernels, "IN_CACHE", (1, 5, 18))
    monkeypatch.setattr(kernels, "large_shapes", lambda: [])
    seen: list[Result] = []
    with pytest.raises(BenchmarkError, match="wrong result: codes of 8 bits"):
        run_kernels(quiet(), "codes", seen.append)
    assert not seen


def test_a_wrong_sweep_ends_the_command_with_1(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    break_backend(monkeypatch, sweep=broken_forward)
    file = tmp_path / "bench.json"
    assert run_command(monkeypatch, "--only", "cache", "--json", str(file)) == 1
    assert "wrong result" in capsys.readouterr().err
    assert not file.exists()


def test_command_writes_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # No kernel meets a limit of 0 s: a missed target is no failure.
    monkeypatch.setattr(kernels, "STEP_SECONDS", 0.0)
    file, page, picture = (tmp_path / "new" / name for name in ("b.json", "b.md", "b.png"))
    options = ["--json", str(file), "--markdown", str(page), "--plot", str(picture)]
    assert run_command(monkeypatch, "--only", "one token", *options) == 0
    written = json.loads(file.read_text())
    assert written["results"][0]["met"] is False
    assert written["machine"] == machine()
    assert "one token/g+psi" in page.read_text()
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_plot_needs_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'bkcore\[plot\]'"):
        plots.prepare_plot(Path("plot.svg"))
    with pytest.raises(InputError, match=r"\.png or \.svg"):
        plots.prepare_plot(Path("plot.jpg"))


def test_unknown_case_raises() -> None:
    with pytest.raises(InputError, match="the cases are large, "):
        run_kernels(quiet(), "nothing")


def test_cases_can_be_named_without_pytorch() -> None:
    assert [case.name for case in CASES] == list(KERNEL_SECONDS)


def test_a_process_that_dies_is_told_as_other_failures_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def die(*arguments: object) -> None:
        raise ProcessDiedError(-9)

    monkeypatch.setattr(kernels, "call_in_new_process", die)
    with pytest.raises(BenchmarkError, match=r"\(2, 30, 17\), ended with exit code -9, probably"):
        run_kernels(quiet(), "fresh")


def test_only_the_native_kernels_are_measured() -> None:
    with use_backend("reference"), pytest.raises(BackendError, match="another backend is forced"):
        run_kernels(quiet())


def test_tables() -> None:
    good = Result("a", (1, 2), 2, 1e-6, 3e-3, "copy", 0.5)
    bad = Result("b", (1, 2), 1, 4.0, 2.0, "copy", 1.0)
    free = Result("c", (1, 2), 1, 4.0, 2.0, "copy")
    rows = markdown_table([good, bad, free]).splitlines()
    assert rows[2] == "| a | 1x2 | 2 | 1 us | 3000.00 | copy | 0.50 | yes |"
    assert rows[3] == "| b | 1x2 | 1 | 4 s | 0.50 | copy | 1.00 | no |"
    assert rows[4] == "| c | 1x2 | 1 | 4 s | 0.50 | copy |  |  |"
    assert table([good, bad, free]).row_count == 3


def test_last_level_cache_is_plausible() -> None:
    size = last_level_cache()
    assert size is None or 2**15 <= size <= 2**34
