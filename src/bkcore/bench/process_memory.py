"""The memory of this process, as Linux counts it."""

from __future__ import annotations

import re
from pathlib import Path

from bkcore.errors import InputError

_STATUS = Path("/proc/self/status")


def require_counts() -> None:
    """Raise where the system does not say how much memory a process has.

    Raises:
        InputError: if it is not Linux.
    """
    if not _STATUS.exists():
        raise InputError(f"memory is read from {_STATUS}, which only Linux has")


def resident_bytes() -> int:
    """Resident memory now."""
    return _bytes("VmRSS")


def peak_bytes() -> int:
    """The most resident memory that this process has had."""
    return _bytes("VmHWM")


def _bytes(field: str) -> int:
    found = re.search(rf"^{field}:\s*(\d+) kB", _STATUS.read_text(encoding="utf-8"), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024
