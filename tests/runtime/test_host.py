"""Cores that other processes keep busy."""

import time
from pathlib import Path
from typing import Any

import pytest

from bkcore_runtime import host


def core(number: int, busy: int, idle: int) -> str:
    return f"cpu{number} {busy} 0 0 {idle} 0 0 0 0 0 0\n"


@pytest.mark.parametrize(
    ("busy", "free"), [((0, 0), 2), ((100, 0), 1), ((100, 100), 1), ((30, 30), 1), ((20, 20), 2)]
)
def test_a_core_that_is_busy_is_not_free(
    tmp_path: Path, monkeypatch: Any, busy: tuple[int, int], free: int
) -> None:
    statistics = tmp_path / "stat"
    statistics.write_text("cpu 1 2 3\n" + core(0, 50, 1000) + core(1, 60, 2000) + core(2, 0, 0))

    def pass_time(seconds: float) -> None:
        first, second = busy
        statistics.write_text(
            core(0, 50 + first, 1100 - first) + core(1, 60 + second, 2100 - second)
        )

    monkeypatch.setattr(host, "_STATISTICS", statistics)
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {0, 1}, raising=False)
    monkeypatch.setattr("time.sleep", pass_time)
    assert host.free_cores() == free


@pytest.mark.parametrize(
    ("value", "threads"),
    [
        (None, None),
        *(("3", 3), (" 12 ", 12), ("4,2", 4), ("5000", 1024)),
        *((each, None) for each in ("", "0", "-1", "many", "1.5", "9" * 5000, ",4")),
    ],
)
def test_the_environment_may_ask_for_threads(
    monkeypatch: Any, value: str | None, threads: int | None
) -> None:
    if value is None:
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    else:
        monkeypatch.setenv("OMP_NUM_THREADS", value)
    assert host.asked_threads() == threads


def test_all_cores_are_free_where_the_system_does_not_say(monkeypatch: Any) -> None:
    monkeypatch.setattr(host, "_STATISTICS", Path("nowhere"))
    assert host.free_cores() == host.usable_cores()


def test_looking_takes_no_longer_than_asked() -> None:
    start = time.monotonic()
    assert 1 <= host.free_cores(0.05) <= host.usable_cores()
    assert time.monotonic() - start < 5


def test_cores_that_the_system_numbers_otherwise_are_free(tmp_path: Path, monkeypatch: Any) -> None:
    statistics = tmp_path / "stat"
    statistics.write_text(core(0, 50, 1000))
    monkeypatch.setattr(host, "_STATISTICS", statistics)
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {6, 7}, raising=False)
    assert host.free_cores(0) == 2
