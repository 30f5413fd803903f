"""The cases of `bkcore bench memory`: what a long sequence costs the language model.

Every point is measured in its own process, because a process's peak never falls. The measure is how
far the peak of resident memory (`VmHWM`; `ru_maxrss` would include the parent's) rises above that
after building the model and its optimizer and taking a short step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import linear_regression, median
from time import perf_counter
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from bkcore.bench.machine import machine
from bkcore.bench.process_memory import peak_bytes, require_counts
from bkcore.bench.settings import SHORTEST
from bkcore.display.progress import Plan
from bkcore.errors import InputError
from bkcore.evaluation.perplexity import score
from bkcore.host import keep_freed_memory
from bkcore.model import LanguageModel, ResNetBKForCausalLM
from bkcore.processes import ProcessDiedError, call_in_new_process

MODEL: dict[str, Any] = {
    "vocab_size": 4096,
    "d_model": 128,
    "n_layers": 3,
    "num_experts": 16,
    "experts_per_token": 2,
    "expert_size": 384,
    "chunked_loss": True,
}
KINDS = ("training", "training, checkpointed", "evaluation")
FIT_FROM = 4096  # below, constant costs weigh too much

_WARM_UP_LENGTH = 64
_STEPS = 3


@dataclass(frozen=True)
class Point:
    """One measurement, on a batch of one sequence.

    Attributes:
        kind: one of `KINDS`. A training step is forward, backward and AdamW; an evaluation is
            `bkcore.evaluation.perplexity.score` with one window.
        length: tokens N.
        peak_bytes: rise of the peak of resident memory.
        seconds: per step, the median of three.
    """

    kind: str
    length: int
    peak_bytes: int
    seconds: float


def run_memory(console: Console, longest: int) -> list[Point]:
    """Measure every kind at N = 1,024, 2,048, ... up to `longest`.

    Raises:
        InputError: if `longest` is below 1,024, or the system is not Linux.
    """
    if longest < SHORTEST:
        raise InputError(f"longest must be at least {SHORTEST}, not {longest}")
    require_counts()
    lengths = [SHORTEST << octave for octave in range((longest // SHORTEST).bit_length())]
    names = {f"{kind}, N={n:,}": (kind, n) for n in lengths for kind in KINDS}
    points = []
    with Plan({name: 2000.0 + n for name, (_, n) in names.items()}, console) as plan:
        for name, (kind, length) in names.items():
            with plan.stage(name):
                points.append(_measure_in_new_process(kind, length))
    return points


def growth(points: Sequence[Point], kind: str, field: str) -> float | None:
    """The power p of N^p that fits a field of a kind's points from N = 4,096 on; 1 is linear.

    None if there are fewer than two such points.
    """
    chosen = [point for point in points if point.kind == kind and point.length >= FIT_FROM]
    if len(chosen) < 2:
        return None
    x = [math.log(point.length) for point in chosen]
    y = [math.log(getattr(point, field)) for point in chosen]
    return linear_regression(x, y).slope


def report(points: Sequence[Point]) -> dict[str, Any]:
    """The JSON file: the machine, the model, every point, and the powers of N."""
    powers = {
        kind: {field: growth(points, kind, field) for field in ("peak_bytes", "seconds")}
        for kind in KINDS
    }
    return {
        "machine": {**machine(), "threads": torch.get_num_threads()},
        "model": MODEL,
        "points": [asdict(point) for point in points],
        "growth": powers,
    }


def table(points: Sequence[Point]) -> Table:
    """The points for a terminal, and the powers of N."""
    powers = ", ".join(
        f"{kind} N^{power:.2f}"
        for kind in KINDS
        if (power := growth(points, kind, "peak_bytes")) is not None
    )
    grid = Table(box=box.SIMPLE_HEAD, show_edge=False, caption=f"memory: {powers}")
    for column in _COLUMNS:
        grid.add_column(column, justify="left" if column == "kind" else "right")
    for row in _rows(points):
        grid.add_row(*row)
    return grid


def markdown_table(points: Sequence[Point]) -> str:
    """The points as a Markdown table."""
    rule = ["---" if column == "kind" else "---:" for column in _COLUMNS]
    rows = [list(_COLUMNS), rule, *_rows(points)]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


_COLUMNS = ("kind", "N", "peak MB", "KB a token", "of half N", "s", "tokens per s")


def _rows(points: Sequence[Point]) -> list[list[str]]:
    by_length = {(point.kind, point.length): point for point in points}
    rows = []
    for kind in KINDS:
        for point in (point for point in points if point.kind == kind):
            half = by_length.get((kind, point.length // 2))
            rows.append(
                [
                    kind,
                    f"{point.length:,}",
                    f"{point.peak_bytes / 1e6:,.0f}",
                    f"{point.peak_bytes / 1e3 / point.length:.1f}",
                    "" if half is None else f"{point.peak_bytes / half.peak_bytes:.2f}",
                    f"{point.seconds:.2f}",
                    f"{point.length / point.seconds:,.0f}",
                ]
            )
    return rows


def _measure_in_new_process(kind: str, length: int) -> Point:
    try:
        point: Point = call_in_new_process(_work, kind, length, torch.get_num_threads())
        return point
    except ProcessDiedError as error:
        raise InputError(
            f"the process that measured {kind} at {length:,} tokens ended with exit code "
            f"{error.exit_code}, probably out of memory; give a smaller --longest"
        ) from error


def _work(send: Callable[[object], None], kind: str, length: int, threads: int) -> Point:
    del send  # nothing to report before the end
    return measure(kind, length, threads)


def measure(kind: str, length: int, threads: int) -> Point:
    """Measure one point in this process, whose peak must not have been higher before."""
    keep_freed_memory()
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    run = _step(LanguageModel(**MODEL), kind)
    run(torch.randint(MODEL["vocab_size"], (_WARM_UP_LENGTH,)))
    before = peak_bytes()
    tokens = torch.randint(MODEL["vocab_size"], (length,))
    times = []
    for _ in range(_STEPS):
        start = perf_counter()
        run(tokens)
        times.append(perf_counter() - start)
    return Point(kind, length, peak_bytes() - before, median(times))


def _step(model: ResNetBKForCausalLM, kind: str) -> Callable[[Tensor], object]:
    if kind == "evaluation":
        return lambda tokens: score(model, tokens, window=len(tokens), batch_size=1, bos_id=0)
    if kind == "training, checkpointed":
        model.activation_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW(model.train().parameters(), fused=True)

    def train(tokens: Tensor) -> None:
        model(tokens[None], labels=tokens[None]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return train
