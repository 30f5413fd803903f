"""The extension of other Python code is refused before it computes anything."""

from __future__ import annotations

import runpy
import sys
from types import SimpleNamespace
from typing import Any

import pytest

import bkcore_runtime
from bkcore_runtime import EngineError, _engine, extension

REMEDY = r"reinstall bkcore-runtime.*pip install --force-reinstall"


@pytest.mark.parametrize("found", [None, 0, extension.INTERFACE + 1])
def test_another_interface_is_refused_with_the_remedy(
    monkeypatch: pytest.MonkeyPatch, found: int | None
) -> None:
    stale: Any = SimpleNamespace() if found is None else SimpleNamespace(__interface__=found)
    monkeypatch.setattr(bkcore_runtime, "_engine", stale)
    needs = f"has interface {found}, but this Python code needs {extension.INTERFACE}"
    with pytest.raises(EngineError, match=f"{needs}; {REMEDY}"):
        runpy.run_path(extension.__file__)


def test_an_extension_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(bkcore_runtime, "_engine")
    monkeypatch.setitem(sys.modules, "bkcore_runtime._engine", None)
    with pytest.raises(EngineError, match=f"did not load .*{REMEDY}"):
        runpy.run_path(extension.__file__)


def test_the_extension_here_has_the_interface() -> None:
    assert runpy.run_path(extension.__file__)["_engine"] is _engine
