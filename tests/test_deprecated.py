"""Names of the release before lead to the new ones, and warn."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import bkcore.core
import bkcore.kernels
from bkcore.deprecated import MODULES, NAMES

SOURCE = Path(__file__).parents[1] / "src"


def imported(name: str) -> ModuleType:
    if ".triton" in name:
        pytest.importorskip("triton")
    return importlib.import_module(name)


def a_name_of(module: ModuleType) -> str:
    """A function or a class that a module defines itself, with a public name if there is one."""
    own = [x for x, value in vars(module).items() if module.__name__ == _home(value)]
    return min(own, key=lambda name: name.startswith("_"))


def _home(value: object) -> str:
    value = getattr(value, "fn", value)  # of a kernel of Triton
    return getattr(value, "__module__", "") if callable(value) else ""


@pytest.mark.parametrize(
    ("old", "place"), [(old, place) for old, places in MODULES.items() for place in places]
)
def test_a_moved_module_has_the_names_of_the_new_ones(old: str, place: str) -> None:
    new = imported(place)
    package, _, leaf = old.rpartition(".")
    module = imported(old)
    assert getattr(imported(package), leaf) is module
    if old == "bkcore.report":  # has modules only
        return
    name = a_name_of(new)
    with pytest.warns(DeprecationWarning, match=re.escape(f"{old}.{name} is bkcore.")):
        assert getattr(module, name) is getattr(new, name)


@pytest.mark.parametrize("old", NAMES)
def test_a_moved_name_is_the_new_one(old: str) -> None:
    place, _, name = old.rpartition(".")
    new_place, _, new = NAMES[old].rpartition(".")
    with pytest.warns(DeprecationWarning, match=re.escape(f"{old} is {NAMES[old]} now; the next")):
        assert getattr(imported(place), name) is getattr(imported(new_place), new)


@pytest.mark.parametrize(
    "old",
    [
        "bkcore.core.bounds.attention_enclosure",
        "bkcore.evaluation.checkpoints.evaluate_checkpoint",
        "bkcore.kernels.cpu.use_isa",
        "bkcore.kernels.step",
        "bkcore.kernels.triton.block_length",
        "bkcore.kernels.weight_levels.INT4_LEVELS",
        "bkcore.memory.keep_freed_memory",
        "bkcore.model.quantized.make_packed",
        "bkcore.products.onednn_products",
        "bkcore.report.demo.DemoSettings",
        "bkcore.report.recipe.read_recipe",
        "bkcore.report.train.run_training",
        "bkcore.training.checkpoints.newest",
    ],
)
def test_old_names_that_users_may_have_lead_somewhere(old: str) -> None:
    """The tables must not lose them before the next release."""
    place, _, name = old.rpartition(".")
    with pytest.warns(DeprecationWarning, match=re.escape(f"{old} is bkcore.")):
        assert getattr(imported(place), name) is not None


def test_what_has_moved_is_not_there_any_more() -> None:
    """A file would be found first, and a name in a module would be taken without a warning."""
    for old in MODULES:
        path = SOURCE / old.replace(".", "/")
        assert not path.exists()
        assert not path.with_suffix(".py").exists()
    for old in NAMES:
        place, _, name = old.rpartition(".")
        assert name not in vars(importlib.import_module(place))


def test_a_function_that_became_a_package_is_still_called() -> None:
    backends: Any = bkcore.kernels.backends
    with pytest.warns(DeprecationWarning, match="describe_backends"):
        assert backends() == bkcore.kernels.describe_backends()


def test_a_moved_module_is_found_by_its_path() -> None:
    """In a fresh process: nothing else has imported it."""
    code = """if True:
        import bkcore
        from bkcore.report import train
        bkcore.memory.usable_cores(), bkcore.kernels.cpu.isa(), bkcore.report.curve.draw_curve
        train.run_training
    """
    command = [sys.executable, "-W", "default", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    warnings = re.findall(r"<string>:(\d): DeprecationWarning: (\S+)", done.stderr)
    moved = ["memory.usable_cores", "kernels.cpu.isa", "report.curve.draw_curve"]
    expected = [("4", f"bkcore.{name}") for name in moved]
    assert warnings == [*expected, ("5", "bkcore.report.train.run_training")]


def test_what_is_set_or_deleted_in_a_moved_module_is_refused_with_the_new_place() -> None:
    old: Any = importlib.import_module("bkcore.kernels.weight_levels")
    where = "bkcore.kernels.weight_levels has moved: it is bkcore.kernels.int4_levels now"
    with pytest.raises(AttributeError, match=f"{where}; set 'INT4_LEVELS' there"):
        old.INT4_LEVELS = None
    with pytest.raises(AttributeError, match=f"{where}; delete 'INT4_LEVELS' there"):
        del old.INT4_LEVELS
    with pytest.warns(DeprecationWarning, match="int4_levels.INT4_LEVELS now"):
        assert old.INT4_LEVELS is not None


def test_nothing_is_loaded_before_it_is_asked_for() -> None:
    code = """if True:
        import sys
        import bkcore.training
        from bkcore.deprecated import MODULES
        sys.exit(not MODULES.keys().isdisjoint(sys.modules))
    """
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_all_that_the_reference_names_is_there_at_once() -> None:
    code = "import bkcore; bkcore.errors, bkcore.core, bkcore.kernels, bkcore.text, bkcore.training"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_other_names_are_missed_as_ever() -> None:
    for module in (bkcore.core, bkcore.kernels, bkcore, importlib.import_module("bkcore.memory")):
        with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
            _ = module.nothing
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("bkcore.report.nothing")
