"""What the figures of a benchmark depend on."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import torch

from bkcore.kernels import backends


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    return {
        "cpu": _cpu_name(),
        "cores": usable_cores(),
        "isa": backends()["cpu"].isa,
        "last_level_cache_bytes": last_level_cache_bytes(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def usable_cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def last_level_cache_bytes() -> int | None:
    """Size of the largest cache; None where the system (Linux) does not say."""
    folder = Path("/sys/devices/system/cpu/cpu0/cache")
    units = {"K": 2**10, "M": 2**20, "G": 2**30}
    texts = [path.read_text(encoding="utf-8").strip() for path in folder.glob("index*/size")]
    return max((int(text[:-1]) * units[text[-1]] for text in texts), default=None)


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"
