"""Keeping freed memory, in a process of its own, because it cannot be undone."""

import subprocess
import sys

import pytest

FAULTS = """
import resource, sys, torch
from bkcore.memory import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
def fill():
    torch.ones(1 << 24)  # 64 MiB
fill()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
fill()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(choice: str) -> int:
    command = [sys.executable, "-c", FAULTS, choice]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="it is about glibc's malloc")
def test_a_second_large_tensor_takes_no_new_pages() -> None:
    # 64 MiB are 16,384 pages of 4 KiB, or 32 huge ones of 2 MiB.
    assert faults("keep") < 16 < faults("let go")
