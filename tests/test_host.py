"""Cores, caches and memory of the machine."""

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from bkcore import host

FAULTS = """
import resource, torch
from bkcore.host import keep_freed_memory
def fill():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(1 << 24)  # 64 MiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print([fill() for _ in range(20)][-1])
keep_freed_memory()
# Not at once: small blocks may be put where the large one was, until there are places for them.
print([fill() for _ in range(20)][-1])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="it is about glibc's malloc")
def test_large_tensors_come_to_take_no_new_pages() -> None:
    # It cannot be undone, so it is tried in a process of its own.
    command = [sys.executable, "-c", FAULTS]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    let_go, kept = map(int, done.stdout.split())
    # 64 MiB are 16,384 pages of 4 KiB, or 32 huge ones of 2 MiB.
    assert kept < 16 < let_go


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


def test_a_cache_that_says_nothing_is_left_out(tmp_path: Path, monkeypatch: Any) -> None:
    for index, text in enumerate(("", "32K", "1M\n", "huge", "\xff")):
        (tmp_path / f"index{index}").mkdir()
        (tmp_path / f"index{index}" / "size").write_text(text)
    monkeypatch.setattr(host, "_CACHES", tmp_path)
    assert host.last_level_cache() == 1 << 20
    monkeypatch.setattr(host, "_CACHES", tmp_path / "none")
    assert host.last_level_cache() is None


def test_thread_count_comes_back() -> None:
    before = torch.get_num_threads()
    with host.torch_threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before
