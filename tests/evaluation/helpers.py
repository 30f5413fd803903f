"""What the tests of checkpoints and of their evaluation share."""

from __future__ import annotations

import errno
from typing import Any

TEXT = "".join(f"the fox sees {n * n % 17} birds and {n % 5} trees .\n" for n in range(300))


def full(*args: Any, **kwargs: Any) -> None:
    """Fail as a write to a full disk does."""
    raise OSError(errno.ENOSPC, "No space left on device")
