"""The page "How it flows" names files and functions that are there."""

import importlib
import re
from operator import attrgetter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "how-it-flows.md").read_text(encoding="utf-8")
ITEMS = re.findall(r"^\d+\. .*\n(?:   .*\n)*", PAGE, re.MULTILINE)
STEP = re.compile(r"\d+\. `(\S+\.py)` `(\S+)`: .+ →\s.+", re.DOTALL)


@pytest.mark.parametrize("item", ITEMS)
def test_every_step_is_there(item: str) -> None:
    step = STEP.fullmatch(item)
    assert step is not None
    file, name = step.groups()
    assert (ROOT / "src" / "bkcore" / file).is_file()
    module = importlib.import_module("bkcore." + file.removesuffix(".py").replace("/", "."))
    assert vars(module)[name.partition(".")[0]].__module__ == module.__name__
    assert callable(attrgetter(name)(module))


def test_there_are_two_walks() -> None:
    assert [PAGE.count(f"`bkcore {command}`\n") for command in ("quantize", "train")] == [1, 1]
    assert len(ITEMS) > 40
