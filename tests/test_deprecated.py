"""Names of the release before lead to the new ones, and warn."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

import bkcore.core
import bkcore.kernels
from bkcore.kernels.backends.cpu import native
from bkcore.kernels.int4_levels import INT4_LEVELS


def test_a_moved_name_warns_and_is_the_new_one() -> None:
    with pytest.warns(DeprecationWarning, match="bkcore.core.recall_step is bkcore.kernels.recall"):
        assert bkcore.core.recall_step is bkcore.kernels.recall_step
    with pytest.warns(DeprecationWarning, match="the next release removes the old name"):
        assert bkcore.kernels.step is bkcore.kernels.sweep_step


def test_a_moved_module_is_imported_by_its_old_name() -> None:
    with pytest.warns(DeprecationWarning, match="is bkcore.kernels.int4_levels.INT4_LEVELS now"):
        assert importlib.import_module("bkcore.kernels.weight_levels").INT4_LEVELS is INT4_LEVELS
    with pytest.warns(DeprecationWarning, match="backends.cpu.native.use_isa now"):
        assert importlib.import_module("bkcore.kernels.cpu").use_isa is native.use_isa


def test_a_function_that_became_a_package_is_still_called() -> None:
    with pytest.warns(DeprecationWarning, match="describe_backends"):
        assert bkcore.kernels.backends() == bkcore.kernels.describe_backends()


def test_a_moved_module_is_found_by_its_path() -> None:
    with pytest.warns(DeprecationWarning, match="bkcore.host.usable_cores now"):
        assert bkcore.memory.usable_cores() >= 1
    with pytest.warns(DeprecationWarning, match="backends.cpu.native.isa now"):
        assert bkcore.kernels.cpu.isa() == native.isa()


def test_all_that_the_reference_names_is_there_at_once() -> None:
    code = "import bkcore; bkcore.errors, bkcore.core, bkcore.kernels, bkcore.text, bkcore.training"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_other_names_are_missed_as_ever() -> None:
    for module in (bkcore.core, bkcore.kernels):
        with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
            _ = module.nothing
