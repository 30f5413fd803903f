"""Which of many combinations `make test` tries; `make test-slow` tries the others."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import pytest


def combinations(*axes: Iterable[Any], quick: list[Any]) -> list[Any]:
    """All combinations of the axes, as parameters; all but the quick ones are marked slow."""
    every = list(itertools.product(*axes))
    wanted = [each if isinstance(each, tuple) else (each,) for each in quick]
    assert all(each in every for each in wanted), f"{quick} are not all among {every}"
    marks = [() if each in wanted else (pytest.mark.slow,) for each in every]
    return [pytest.param(*each, marks=mark) for each, mark in zip(every, marks, strict=True)]
