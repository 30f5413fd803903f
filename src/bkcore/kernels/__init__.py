"""The O(N) sweep behind every public function, and the choice of what runs it."""

from bkcore.kernels.ops import sweep
from bkcore.kernels.selection import BackendInfo, backends, use_backend

__all__ = ["BackendInfo", "backends", "sweep", "use_backend"]
