"""Packages that import their names when these are first used, because PyTorch and transformers take
seconds to import."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any

from bkcore.deprecated import moved_names


def lazy_names(package: str, places: Mapping[str, str]) -> Callable[[str], Any]:
    """The `__getattr__` of a package that imports its names, and its modules, when first used.

    Hide it from type checkers: they then follow the imports, and notice misspelt names.

    Args:
        package: its name.
        places: for each of its modules, the names that the package takes from there, separated by
            blanks.
    """
    modules = {name: module for module, names in places.items() for name in names.split()}
    moved = moved_names(package)

    def find(name: str) -> Any:
        if name in modules:
            value = getattr(importlib.import_module(f"{package}.{modules[name]}"), name)
            setattr(sys.modules[package], name, value)  # the next use finds it there
            return value
        is_module = name.isidentifier() and not name.startswith("_")
        if is_module and find_spec(f"{package}.{name}") is not None:
            return importlib.import_module(f"{package}.{name}")
        return moved(name)

    return find
