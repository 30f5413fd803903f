"""The rows of `bkcore bench gpu`: the Triton kernels against a copy, each other and float32.

Times are those of Triton's own timer: CUDA events around single calls, the median, with the cache
of the GPU emptied before each.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from functools import partial

import torch
from rich.console import Console

from bkcore.bench.kernels import CodedSweep, Gradient
from bkcore.bench.problem import FORMS, Problem, check_parts, random_problem, true_parts
from bkcore.bench.result import Result
from bkcore.errors import BackendError
from bkcore.kernels import backends, use_backend

SHAPES = ((8, 4096, 1024), (1, 1_048_576, 64))
COPY_FRACTION = 0.5
MOST_BACKWARD = 3.0
LEAST_CODES_SPEEDUP = 1.8

Timer = Callable[[Callable[[], object]], float]
"""Seconds of a call."""


def run_gpu(console: Console, device: str = "cuda", timer: Timer | None = None) -> list[Result]:
    """Measure every form of the sweep, its results checked first.

    Raises:
        BackendError: if there is no GPU or no Triton.
        BenchmarkError: if a result is wrong.
    """
    info = backends()["triton"]
    if not info.available or (device == "cuda" and not torch.cuda.is_available()):
        raise BackendError(f"this measures the Triton kernels, but {info.reason or 'in no GPU'}")
    seconds = timer or _seconds
    results = []
    with use_backend("triton"):
        for shape in SHAPES:
            for form in FORMS:
                problem = random_problem(form, shape).to(device)
                for result in _rows(problem, seconds):
                    console.print(f"{result.name} {shape}: {result.seconds * 1e3:.3f} ms")
                    results.append(result)
    return results


def _seconds(call: Callable[[], object]) -> float:
    testing = importlib.import_module("triton.testing")
    return testing.do_bench(call, return_mode="median") / 1e3


def _rows(problem: Problem, seconds: Timer) -> Iterator[Result]:
    form, shape = problem.form, problem.shape
    row = partial(Result, shape=shape, threads=0)
    with torch.inference_mode():
        check_parts(problem, problem.run(), true_parts(problem))
        old = torch.ones(problem.compulsory_bytes // 8, device=problem.v.device)
        new = torch.empty_like(old)
        forward, copy = seconds(problem.run), seconds(lambda: new.copy_(old))
        moved = f"{problem.compulsory_bytes / 1e6:,.0f} MB in and out"
        yield row(
            f"gpu/{form}",
            seconds=forward,
            baseline_seconds=copy,
            baseline="copy",
            target=COPY_FRACTION,
            note=moved,
        )
    gradient = Gradient(problem)
    gradient.check()
    yield row(
        f"gpu/backward/{form}",
        seconds=seconds(gradient.backward),
        baseline_seconds=forward,
        baseline="forward",
        target=1 / MOST_BACKWARD,
    )
    with torch.inference_mode():
        for bits in (8, 4):
            coded = CodedSweep(problem, bits)
            coded.check()
            yield row(
                f"gpu/codes/{form}/int{bits}",
                seconds=seconds(coded.run),
                baseline_seconds=seconds(coded.decoded.run),
                baseline="float32 sweep",
                target=LEAST_CODES_SPEEDUP if bits == 8 else None,
            )
