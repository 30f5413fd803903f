"""What is asked of the machine: its cores, its caches, and its allocator."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import sys
import time
from pathlib import Path

# The numbers of glibc's malloc.h.
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
    """Cores that this process may run on and that nobody keeps busy now, at least 1.

    Looks at them for so long. Where the system (Linux) does not say, all count as free.
    """
    before = _core_times()
    if not before:
        return usable_cores()
    time.sleep(seconds)
    after = _core_times()
    idle = 0.0
    for core in os.sched_getaffinity(0):
        if core not in before or core not in after:  # containers may number them otherwise
            idle += 1
            continue
        (idle_then, all_then), (idle_now, all_now) = before[core], after[core]
        idle += (idle_now - idle_then) / max(all_now - all_then, 1)
    return max(1, min(usable_cores(), round(idle)))


def _core_times() -> dict[int, tuple[int, int]]:
    """Ticks that each core was idle, and all of its ticks, since the system started."""
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
    """Bytes of the largest cache; None where the system (Linux) does not say."""
    sizes = []
    for path in _CACHES.glob("index*/size"):
        with contextlib.suppress(OSError, UnicodeError):
            found = re.fullmatch(r"(\d+)([KMG])\s*", path.read_text(encoding="ascii"))
            if found:
                sizes.append(int(found[1]) * _UNITS[found[2]])
    return max(sizes, default=None)


def keep_freed_memory() -> None:
    """Let the whole process keep freed memory for its next tensors, until it ends.

    glibc hands large blocks back to the system when they are freed, and gets fresh, zeroed pages
    for the next: a training step of a small model then spends a tenth of its time in the kernel.

    For programs, such as bkcore's own commands; importing the library changes nothing. It does
    nothing outside of Linux, or where malloc is not glibc's.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _UNLIMITED)
        mallopt(_M_TRIM_THRESHOLD, _UNLIMITED)
        mallopt(_M_TOP_PAD, 1 << 26)
