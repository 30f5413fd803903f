"""Questions and settings for the machine: cores, caches and the allocator."""

from __future__ import annotations

import contextlib
import ctypes
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from bkcore_runtime import host as _runtime

usable_cores = _runtime.usable_cores
free_cores = _runtime.free_cores

# Constants from glibc's malloc.h.
_M_TRIM_THRESHOLD = -1
_M_TOP_PAD = -2
_M_MMAP_THRESHOLD = -3
_UNLIMITED = 2**31 - 1

_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


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
