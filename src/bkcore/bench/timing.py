"""Timing: functions run in alternation, so that disturbances affect all of them alike."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median

from bkcore.deprecated import moved_names

Call = Callable[[], object]

SECONDS = 0.3  # timed for every pair of functions, at least
_ROUNDS = 7
_ROUNDS_IF_SLOW = 3
_SLOW_SECONDS = 0.5

__getattr__ = moved_names(__name__)


def interleaved(*functions: Call) -> tuple[float, ...]:
    """Seconds per call of each function: the median over rounds that time each in turn.

    Every function is first called twice to warm up. A round calls a fast function many times in a
    row and takes the mean. The garbage collector is off.
    """
    with _without_collection():
        once = [_warm(function) for function in functions]
        rounds = _ROUNDS if sum(once) < _SLOW_SECONDS else _ROUNDS_IF_SLOW
        share = SECONDS / (2 * rounds)
        counts = [max(1, math.ceil(share / seconds)) for seconds in once]
        found: list[list[float]] = [[] for _ in functions]
        for _ in range(rounds):
            for function, count, times in zip(functions, counts, found, strict=True):
                times.append(_mean_seconds(function, count))
    return tuple(median(times) for times in found)


def _warm(function: Call) -> float:
    function()
    return _mean_seconds(function, 1)


def _mean_seconds(function: Call, count: int) -> float:
    start = time.perf_counter()
    for _ in range(count):
        function()
    return (time.perf_counter() - start) / count


@contextmanager
def _without_collection() -> Iterator[None]:
    was_on = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
