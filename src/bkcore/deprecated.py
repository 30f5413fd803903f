"""Old names, which warn and redirect to the new ones for one release."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any


def moved_names(module: str, names: Mapping[str, str]) -> Callable[[str], Any]:
    """The `__getattr__` of a module whose `names` have moved.

    Args:
        module: its name.
        names: from old name to full new name, such as "bkcore.kernels.sweep_step".
    """

    def find(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        _warn(f"{module}.{name}", names[name])
        place, _, new = names[name].rpartition(".")
        return getattr(importlib.import_module(place), new)

    return find


def moved_module(old: str, new: str) -> None:
    """Keep a module importable by its old name, and available as an attribute of its package."""
    module = sys.modules[old] = _MovedModule(old, new)
    package, _, name = old.rpartition(".")
    setattr(sys.modules[package], name, module)


def called_module(name: str, new: str) -> None:
    """Make a module callable, since a function had its name before."""

    class Called(ModuleType):
        def __call__(self, *args: Any) -> Any:
            _warn(f"{name}()", f"{new}()")
            place, _, function = new.rpartition(".")
            return getattr(importlib.import_module(place), function)(*args)

    sys.modules[name].__class__ = Called


class _MovedModule(ModuleType):
    def __init__(self, name: str, new: str) -> None:
        super().__init__(name, f"Moved to `{new}`.")
        self.__dict__["_new"] = new

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # what the import system looks for
            raise AttributeError(name)
        _warn(f"{self.__name__}.{name}", f"{self._new}.{name}")
        return getattr(importlib.import_module(self._new), name)


def _warn(old: str, new: str) -> None:
    warnings.warn(
        f"{old} is {new} now; the next release removes the old name",
        DeprecationWarning,
        stacklevel=3,
    )
