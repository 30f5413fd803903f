"""Cores of the machine: how many there are, and how many are idle."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path

MOST_THREADS = 1024
"""That an engine may have."""

_STATISTICS = Path("/proc/stat")


def usable_cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def asked_threads() -> int | None:
    """The threads that the environment variable OMP_NUM_THREADS asks for; None if it does not."""
    first = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()  # of nested levels
    if not re.fullmatch(r"[0-9]{1,9}", first) or not int(first):
        return None
    return min(int(first), MOST_THREADS)


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
