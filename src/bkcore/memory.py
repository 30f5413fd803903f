"""Large temporary tensors without page faults.

glibc hands large blocks back to the system when they are freed, and gets fresh, zeroed pages for
the next: a training step of a small model then spends a tenth of its time in the kernel.
"""

from __future__ import annotations

import ctypes
import sys

# The numbers of glibc's malloc.h.
_M_TRIM_THRESHOLD = -1
_M_TOP_PAD = -2
_M_MMAP_THRESHOLD = -3
_UNLIMITED = 2**31 - 1


def keep_freed_memory() -> None:
    """Let the whole process keep freed memory for its next tensors, until it ends.

    For programs, such as bkcore's own commands; importing the library changes nothing. It does
    nothing outside of Linux, or where malloc is not glibc's.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _UNLIMITED)
        mallopt(_M_TRIM_THRESHOLD, _UNLIMITED)
        mallopt(_M_TOP_PAD, 1 << 26)
