"""Timing in alternation, and what it restores."""

import gc
from collections.abc import Callable
from itertools import chain, repeat

import pytest

from bkcore.bench import timing
from bkcore.bench.timing import interleaved


class Clock:
    """Time that passes only while a function runs."""

    def __init__(self) -> None:
        self.now = 0.0
        self.log: list[str] = []

    def taking(self, name: str, *seconds: float) -> Callable[[], None]:
        durations = chain(seconds, repeat(seconds[-1]))

        def call() -> None:
            assert not gc.isenabled()
            self.log.append(name)
            self.now += next(durations)

        return call


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr("bkcore.bench.timing.time.perf_counter", lambda: found.now)
    return found


def test_seconds_a_call(clock: Clock) -> None:
    fast, slow = interleaved(clock.taking("fast", 1e-3), clock.taking("slow", 0.1))
    assert fast == pytest.approx(1e-3)
    assert slow == pytest.approx(0.1)


def test_functions_alternate_after_warming_up(clock: Clock) -> None:
    interleaved(clock.taking("a", 0.1), clock.taking("b", 0.1))
    assert clock.log == ["a", "a", "b", "b", *["a", "b"] * 7]


def test_the_first_call_and_one_slow_round_do_not_count(clock: Clock) -> None:
    (seconds,) = interleaved(clock.taking("a", 50.0, 0.1, 0.1, 9.0, 0.1))
    assert seconds == pytest.approx(0.1)


def test_fast_functions_are_timed_long_enough(clock: Clock) -> None:
    interleaved(clock.taking("a", 1e-5), clock.taking("b", 1e-5))
    assert clock.now >= timing.SECONDS


def test_collection_comes_back_after_an_error() -> None:
    def fail() -> None:
        raise ValueError

    with pytest.raises(ValueError):  # noqa: PT011
        interleaved(fail)
    assert gc.isenabled()
