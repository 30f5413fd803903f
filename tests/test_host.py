"""Keeping freed memory, in a process of its own, because it cannot be undone."""

import subprocess
import sys

import pytest

FAULTS = """
import resource, sys, torch
from bkcore.host import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
def fill():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(1 << 24)  # 64 MiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
# Not each time: a small block may have been put where the large one was.
print(min([fill() for _ in range(6)]))
"""


def faults(choice: str) -> int:
    command = [sys.executable, "-c", FAULTS, choice]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="it is about glibc's malloc")
def test_large_tensors_come_to_take_no_new_pages() -> None:
    # 64 MiB are 16,384 pages of 4 KiB, or 32 huge ones of 2 MiB.
    assert faults("keep") < 16 < faults("let go")
