"""Cores, caches and memory of the machine."""

import subprocess
import sys
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
