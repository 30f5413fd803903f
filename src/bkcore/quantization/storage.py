"""Buffers whose dtype is part of the format."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor, nn


class StoredDtypes(nn.Module):
    """A module that protects the dtype of some buffers from `.half()`, `.double()`, `.to(dtype)`.

    These buffers move between devices like all others. But if scales were rounded to another dtype,
    they would no longer be the ones that the codes were computed with.
    """

    stored: ClassVar[tuple[str, ...]]

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> Any:
        before = {name: self._buffers.get(name) for name in self.stored}
        super()._apply(fn, *args, **kwargs)
        for name, old in before.items():
            new = self._buffers.get(name)
            if old is not None and new is not None and new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)
        return self
