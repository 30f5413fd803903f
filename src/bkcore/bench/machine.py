"""The machine and software that the figures of a benchmark depend on."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import torch

from bkcore.host import last_level_cache, usable_cores
from bkcore.kernels import describe_backends


def machine() -> dict[str, Any]:
    """The machine and software that the figures depend on."""
    return {
        "cpu": _cpu_name(),
        "cores": usable_cores(),
        "isa": describe_backends()["cpu"].isa,
        "last_level_cache_bytes": last_level_cache(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"
