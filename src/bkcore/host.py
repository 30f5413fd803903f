"""Questions and settings for the machine: cores, caches and the allocator."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path

# Constants from glibc's malloc.h.
_M_TRIM_THRESHOLD = -1
_M_TOP_PAD = -2
_M_MMAP_THRESHOLD = -3
_UNLIMITED = 2**31 - 1

_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_STATISTICS = Path("/proc/stat")
_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def usable_cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def free_cores(seconds: float = 0.2) -> int:
    """How many of this process's cores are idle now, at least 1.

    Watches them for `seconds`. All count as free if the system does not say (Linux does).
    """
    before = _core_times()
    if not before:
        return usable_cores()
    time.sleep(seconds)
    after = _core_times()
    idle = 0.0
    for core in os.sched_getaffinity(0):
        if core not in before or core not in after:  # containers may number cores differently
            idle += 1
            continue
        (idle_then, all_then), (idle_now, all_now) = before[core], after[core]
        idle += (idle_now - idle_then) / max(all_now - all_then, 1)
    return max(1, min(usable_cores(), round(idle)))


@contextlib.contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Let PyTorch, and bkcore with it, use `count` threads inside a with block."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _core_times() -> dict[int, tuple[int, int]]:
    """Idle ticks and total ticks of each core since the system started."""
    try:
        lines = _STATISTICS.read_text(encoding="ascii").splitlines()
    except OSError:
        return {}
    times = {}
    for name, *fields in (line.split() for line in lines if re.match(r"cpu\d", line)):
        # user, nice, system, idle, waiting for a disk, interrupts (proc_stat(5))
        ticks = [int(field) for field in fields[:8]]
        times[int(name[3:])] = ticks[3] + ticks[4], sum(ticks)
    return times


def last_level_cache() -> int | None:
    """Bytes of the largest cache; None if the system does not say (Linux does)."""
    sizes = []
    for path in _CACHES.glob("index*/size"):
        with contextlib.suppress(OSError, UnicodeError):
            found = re.fullmatch(r"(\d+)([KMG])\s*", path.read_text(encoding="ascii"))
            if found:
                sizes.append(int(found[1]) * _UNITS[found[2]])
    return max(sizes, default=None)


def keep_freed_memory() -> None:
    """Make the process keep freed memory for its next tensors until it ends.

    By default glibc returns large blocks to the system when they are freed, and gets fresh, zeroed
    pages for the next ones. A training step of a small model then spends a tenth of its time in the
    operating system's kernel.

    Meant for programs, such as bkcore's own commands; importing the library changes nothing. Does
    nothing outside Linux, or if malloc is not glibc's.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _UNLIMITED)
        mallopt(_M_TRIM_THRESHOLD, _UNLIMITED)
        mallopt(_M_TOP_PAD, 1 << 26)
