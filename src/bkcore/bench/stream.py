"""The cases of `bkcore bench stream`: what one more token costs, early and late in a text.

A model continues from two states, young and old, with the same tokens in alternation, so that the
ratio of their times does not depend on what else the machine does.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from statistics import median
from time import perf_counter
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from bkcore.bench.machine import machine
from bkcore.bench.memory import MODEL
from bkcore.bench.process_memory import require_counts, resident_bytes
from bkcore.bench.random_models import random_model
from bkcore.bench.settings import YOUNG
from bkcore.display.progress import Plan
from bkcore.errors import BenchmarkError, InputError
from bkcore.model import ResNetBKForCausalLM, StreamState

_CHUNK = 8_192
_PAIRS = 400


@dataclass(frozen=True)
class StreamResult:
    """The figures.

    Attributes:
        young, old: tokens read before the timed ones.
        young_microseconds, old_microseconds: per token of one sequence, medians.
        ratio: old over young, the median of the pairs.
        resident_growth_bytes: how far resident memory rose, or fell if negative, while the model
            read the last seven eighths of the old text.
        state_bytes: size of the state of one sequence, the same for both.
    """

    young: int
    old: int
    young_microseconds: float
    old_microseconds: float
    ratio: float
    resident_growth_bytes: int
    state_bytes: int


@torch.inference_mode()
def run_stream(console: Console, length: int) -> StreamResult:
    """Read `length` random tokens, then time single tokens there and at position 1,000.

    Raises:
        InputError: if `length` is below 8,000, or the system is not Linux.
        BenchmarkError: if the streamed tokens' logits differ from those of the parallel pass, or
            the state has grown.
    """
    if length < 8 * YOUNG:
        raise InputError(f"length must be at least {8 * YOUNG}, not {length}")
    require_counts()
    model = random_model(**MODEL)
    tokens = torch.randint(MODEL["vocab_size"], (1, _PAIRS))
    with Plan({"read": length / 10_000, "time": _PAIRS / 200}, console) as plan:
        with plan.stage("read") as advance:
            young = _read(model, model.first_state(), YOUNG)
            old = _read(model, young, length // 8 - YOUNG)
            before = resident_bytes()
            while int(old.seen) < length:
                old = _read(model, old, min(_CHUNK, length - int(old.seen)))
                advance(int(old.seen) / length)
            growth = resident_bytes() - before
        with plan.stage("time"):
            _check(model, tokens, old)
            _check_sizes(young, old)
            times = _time_in_alternation(model, tokens, (young, old))
    return StreamResult(
        young=YOUNG,
        old=length,
        young_microseconds=1e6 * median(first for first, _ in times),
        old_microseconds=1e6 * median(second for _, second in times),
        ratio=median(second / first for first, second in times),
        resident_growth_bytes=growth,
        state_bytes=_bytes(old),
    )


def report(result: StreamResult) -> dict[str, Any]:
    """The JSON file."""
    return {
        "machine": {**machine(), "threads": torch.get_num_threads()},
        "model": MODEL,
        "stream": asdict(result),
    }


def summary(result: StreamResult) -> str:
    """Sentences for a terminal."""
    return (
        f"{result.young_microseconds:,.0f} us per token at position {result.young:,}, "
        f"{result.old_microseconds:,.0f} us at {result.old:,}: {result.ratio:.3f} times as much. "
        f"The state that a text needs takes {result.state_bytes / 1e3:,.0f} KB at both. "
        "From an eighth of the text to its end, the memory of the process changed by "
        f"{result.resident_growth_bytes / 1e6:+.1f} MB. It reads thousands of tokens at a time "
        "there, and the allocator keeps buffers of that size for later calls."
    )


def _read(model: ResNetBKForCausalLM, state: StreamState, count: int) -> StreamState:
    for size in [_CHUNK] * (count // _CHUNK) + [count % _CHUNK]:
        if size:
            ids = torch.randint(MODEL["vocab_size"], (1, size))
            state = _next(model, ids, state)[1]
    return state


def _next(
    model: ResNetBKForCausalLM, ids: Tensor, state: StreamState
) -> tuple[Tensor, StreamState]:
    output = model(ids, cache_params=state)
    return output.logits, output.cache_params


def _check(model: ResNetBKForCausalLM, tokens: Tensor, state: StreamState) -> None:
    whole, _ = _next(model, tokens, state)
    for index, token in enumerate(tokens[0]):
        logits, state = _next(model, token.view(1, 1), state)
        expected = whole[0, index]
        error = float((logits[0, 0] - expected).abs().max())
        if not error <= 1e-3 * float(expected.abs().max()):
            raise BenchmarkError(
                f"the logits of token {index} after position {int(state.seen)} differ by "
                f"{error:.2e} from those of the parallel pass"
            )


def _bytes(state: StreamState) -> int:
    return sum(x.nbytes for layer in state.layers for x in vars(layer).values())


def _check_sizes(young: StreamState, old: StreamState) -> None:
    if _bytes(young) != _bytes(old):
        raise BenchmarkError(
            f"the state takes {_bytes(young)} bytes after {int(young.seen)} tokens, but "
            f"{_bytes(old)} after {int(old.seen)}; it must not grow with the text"
        )


def _time_in_alternation(
    model: ResNetBKForCausalLM, tokens: Tensor, states: tuple[StreamState, StreamState]
) -> list[tuple[float, float]]:
    states_now, times = list(states), []
    for token in tokens[0]:
        pair = []
        for place in (0, 1):
            start = perf_counter()
            _, states_now[place] = _next(model, token.view(1, 1), states_now[place])
            pair.append(perf_counter() - start)
        times.append((pair[0], pair[1]))
    return times
