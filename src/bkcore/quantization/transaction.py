"""All or nothing: a step that fails leaves a module as it was."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

_CONTAINERS = (dict, list, set, deque)


@contextmanager
def all_or_nothing(model: nn.Module) -> Iterator[None]:
    """Restore every module of `model` if the block raises anything.

    Submodules, parameters, buffers, hooks and plain attributes come back as the same objects, so
    optimizers and handles stay valid. Only references are kept, not copies, so this takes no extra
    memory for the model. Hence changes in place are not undone: a tensor is restored only if its
    module lists it in `written_in_place`, and the block must replace other objects rather than
    change them.
    """
    kept = [_Kept(module) for module in model.modules()]
    try:
        yield
    except BaseException:
        for module in kept:
            module.restore()
        raise


class _Kept:
    """The attributes of one module, the contents of its containers, the values of its tensors."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.attributes = dict(vars(module))
        containers = [x for x in vars(module).values() if isinstance(x, _CONTAINERS)]
        self.containers = [(x, x.copy()) for x in containers]
        tensors = module._parameters | module._buffers
        written = (tensors.get(name) for name in getattr(module, "written_in_place", ()))
        self.values = [(x, x.detach().clone()) for x in written if x is not None]

    def restore(self) -> None:
        vars(self.module).clear()
        vars(self.module).update(self.attributes)
        for container, contents in self.containers:
            _refill(container, contents)
        with torch.no_grad():
            for tensor, value in self.values:
                tensor.copy_(value)


def _refill(container: Any, contents: Any) -> None:
    """Restore a container's contents in place, because others hold references to it."""
    container.clear()
    add = container.extend if isinstance(container, list | deque) else container.update
    add(contents)
