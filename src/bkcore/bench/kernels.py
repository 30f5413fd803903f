"""The cases of `bkcore bench kernels`.

A case is a function from thread counts to results. To add one, write it, and list it in `CASES` and
in `settings.KERNEL_SECONDS`. A case first checks what it times, on the same shape.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from rich.console import Console
from torch import Tensor

from bkcore.arguments import starting_with
from bkcore.bench.problem import (
    FORMS,
    Problem,
    check_gradients,
    check_parts,
    random_problem,
    repeat_channels,
    true_gradients,
    true_parts,
)
from bkcore.bench.result import Result
from bkcore.bench.rival_solvers import comparison, missing_rivals
from bkcore.bench.settings import KERNEL_SECONDS
from bkcore.bench.timing import Call, interleaved
from bkcore.core.resolvent import resolvent_diagonal_parts
from bkcore.display.console import say
from bkcore.display.progress import Plan
from bkcore.errors import BackendError, BenchmarkError
from bkcore.host import last_level_cache, torch_threads, usable_cores
from bkcore.kernels import describe_backends, sweep_codes, sweep_step
from bkcore.kernels.backends.cpu import native
from bkcore.processes import ProcessDiedError, call_in_new_process
from bkcore.quantization import affine
from bkcore.quantization.packing import pack_int4

Shape = tuple[int, int, int]

LARGE: tuple[Shape, ...] = ((8, 4096, 256), (4, 4096, 1024))
IN_CACHE: Shape = (1, 1024, 256)
ONE_LANE: Shape = (1, 1_000_000, 1)
SHORT: Shape = (256, 4096, 64)
LONG: Shape = (1, 1_048_576, 64)
ONE_TOKEN: Shape = (1, 1, 1024)
LAYOUT_ELEMENTS = 2**22
LAYOUT_LANES = (1, 3, 16, 17, 64, 100, 256, 1024)
LAYOUT_BATCHES = (16, 64, 1000)
LEAST_CHAINS = 16

COPY_FRACTION = 0.65
NANOSECONDS = {"g": 0.35, "two-sided": 0.8}  # per element and core, AVX-512, data in cache
MOST_BACKWARD = 2.5
LEAST_ONE_LANE_SPEEDUP = 8.0
MOST_LAYOUT_SPREAD = 3.0
MOST_GROWTH = 1.3
STEP_SECONDS = 6e-6
LEAST_CODES_SPEEDUP = 2.0
LEAST_LEVELS_SPEED = 1 / 1.2


@dataclass(frozen=True)
class Case:
    """A group of measurements.

    Attributes:
        name: the start of its rows' names.
        measure: returns the results for some thread counts.
    """

    name: str
    measure: Callable[[Sequence[int]], Iterator[Result]]

    @property
    def seconds(self) -> float:
        """About how long it takes, for the progress bar."""
        return KERNEL_SECONDS[self.name]


def run_kernels(
    console: Console, only: str = "", on_result: Callable[[Result], None] = lambda result: None
) -> list[Result]:
    """Measure the cases whose names start with `only`.

    Raises:
        InputError: if there is no such case.
        BackendError: if the native kernels are not in use.
        BenchmarkError: if a result is wrong, or the process of a case dies.
    """
    names = starting_with(only, KERNEL_SECONDS, "case")
    cases = [case for case in CASES if case.name in names]
    _require_native()
    if any(case.measure is comparison for case in cases):
        for name, reason in missing_rivals().items():
            say(console, f"left out of the comparison: {name}, {reason}")
    counts = thread_counts()
    results = []
    with Plan({case.name: case.seconds for case in cases}, console) as plan:
        for case in cases:
            with plan.stage(case.name) as advance:
                start = time.perf_counter()
                for result in case.measure(counts):
                    results.append(result)
                    on_result(result)
                    advance(min(1.0, (time.perf_counter() - start) / case.seconds))
    return results


def thread_counts() -> tuple[int, ...]:
    """1, and also 2 if there are two cores."""
    return (1, 2) if usable_cores() > 1 else (1,)


def _require_native() -> None:
    info = describe_backends()["cpu"]
    if "cpu" not in info.used_for:
        reason = info.reason or "another backend is forced"
        raise BackendError(f"this measures the native kernels, but {reason}")


def large(counts: Sequence[int]) -> Iterator[Result]:
    """Arrays beyond the last-level cache, against a copy that moves as many bytes."""
    for shape in large_shapes():
        for form in FORMS:
            problem = random_problem(form, shape)
            truth = true_parts(problem)
            old, new = _buffer(problem), _buffer(problem)
            for count in counts:
                own, copy = _time_forward(problem, truth, count, partial(new.copy_, old))
                yield Result(f"large/{form}", shape, count, own, copy, "copy", COPY_FRACTION)


def large_shapes() -> list[Shape]:
    """`LARGE`, with the batch grown until three times the last-level cache has to be moved."""
    cache = last_level_cache() or 0
    return [(max(b, math.ceil(3 * cache / (12 * n * h))), n, h) for b, n, h in LARGE]


def fresh_memory(counts: Sequence[int]) -> Iterator[Result]:
    """Like `large`, but every result gets new memory from the system, page faults included."""
    shape = large_shapes()[0]
    for count in counts:
        try:
            own, clone = call_in_new_process(_time_with_fresh_memory, shape, count)
        except ProcessDiedError as error:
            raise BenchmarkError(
                f"the process that measured fresh memory, shape {shape}, ended with exit code "
                f"{error.exit_code}, probably out of memory; free some, or name other cases with "
                "--only"
            ) from error
        note = "both allocate, in a process that returns freed memory"
        yield Result("fresh memory/g", shape, count, own, clone, "clone", note=note)


def _time_with_fresh_memory(
    send: Callable[[object], None], shape: Shape, count: int
) -> Sequence[float]:
    problem = random_problem("g", shape)
    return _time_forward(problem, true_parts(problem), count, _buffer(problem).clone)


def _buffer(problem: Problem) -> Tensor:
    """Half the compulsory bytes of a problem; copying it moves all of them."""
    return torch.ones(problem.compulsory_bytes // 8)


def in_cache(counts: Sequence[int]) -> Iterator[Result]:
    """A small array, against a limit in nanoseconds per element and core."""
    for form, limit in NANOSECONDS.items():
        problem = random_problem(form, IN_CACHE)
        truth = true_parts(problem)
        for count in counts:
            (seconds,) = _time_forward(problem, truth, count)
            allowed = limit * 1e-9 * problem.elements / count
            target = 1.0 if native.isa() == "avx512" else None
            baseline = f"limit {limit} ns"
            yield Result(f"cache/{form}", IN_CACHE, count, seconds, allowed, baseline, target)


def backward(counts: Sequence[int]) -> Iterator[Result]:
    """The derivative of the sweep, against the sweep itself."""
    shapes = [("large", shape) for shape in large_shapes()]
    for size, shape in [*shapes, ("cache", IN_CACHE)]:
        for form in FORMS:
            gradient = Gradient(random_problem(form, shape))
            for count in counts:
                with torch_threads(count):
                    gradient.check()
                    own, forward = interleaved(gradient.backward, gradient.forward)
                name = f"backward/{size}/{form}"
                yield Result(name, shape, count, own, forward, "forward", 1 / MOST_BACKWARD)


class Gradient:
    """A sweep whose graph is kept, so that the backward pass can be timed alone.

    Args:
        problem: what to sweep; gradients reach all of its tensors.
    """

    def __init__(self, problem: Problem) -> None:
        self._problem = problem.with_gradients()
        self._inputs = self._problem.inputs()
        self._parts = self.forward()
        batch, sites, kinds, lanes = self._parts.shape
        generator = torch.Generator().manual_seed(1)
        distinct = torch.randn(batch, sites, kinds, problem.period, generator=generator)
        self._cotangent = repeat_channels(distinct, lanes).to(problem.v.device)
        self._truth = true_gradients(problem, self._cotangent)

    def forward(self) -> Tensor:
        return self._problem.run()

    def backward(self) -> Sequence[Tensor]:
        return torch.autograd.grad(self._parts, self._inputs, self._cotangent, retain_graph=True)

    def check(self) -> None:
        check_gradients(self._problem, self.backward(), self._truth)


def one_lane(counts: Sequence[int]) -> Iterator[Result]:
    """A single long chain, against sweeping one site after the other."""
    for form in FORMS:
        problem = random_problem(form, ONE_LANE)
        truth = true_parts(problem)
        for count in counts:
            sequential = partial(sequential_one_lane, problem)
            own, slow = _time_forward(problem, truth, count, sequential)
            target = LEAST_ONE_LANE_SPEEDUP if count > 1 else None
            yield Result(f"one lane/{form}", ONE_LANE, count, own, slow, "sequential", target)


def sequential_one_lane(problem: Problem) -> Tensor:
    """The sweep one site after the other, whatever the kernel would choose."""
    with native.sequential():
        return problem.run()


def layouts(counts: Sequence[int]) -> Iterator[Result]:
    """Shapes of about equal volume, against the fastest of them per element."""
    for form in ("g", "two-sided"):
        problems = [random_problem(form, shape) for shape in _layout_shapes()]
        runs = [problem.run for problem in problems]
        chains = [random_problem(form, (b, LAYOUT_ELEMENTS // b, 1)) for b in LAYOUT_BATCHES]
        runs += [partial(_run_chains, problem) for problem in chains]
        names = [f"layout/{form}"] * len(problems) + [f"layout (B, N)/{form}"] * len(chains)
        problems += chains
        truths = [true_parts(problem) for problem in problems]
        for count in counts:
            with torch_threads(count), torch.inference_mode():
                for problem, run, truth in zip(problems, runs, truths, strict=True):
                    check_parts(problem, run(), truth)
                times = interleaved(*runs)
            pairs = list(zip(problems, times, strict=True))
            best = min(seconds / problem.elements for problem, seconds in pairs)
            for name, (problem, seconds) in zip(names, pairs, strict=True):
                allowed = best * problem.elements
                target = 1 / MOST_LAYOUT_SPREAD
                yield Result(name, problem.shape, count, seconds, allowed, "best", target)


def _layout_shapes() -> list[Shape]:
    batches = [(math.ceil(LEAST_CHAINS / lanes), lanes) for lanes in LAYOUT_LANES]
    return [(batch, LAYOUT_ELEMENTS // (batch * lanes), lanes) for batch, lanes in batches]


def _run_chains(problem: Problem) -> Tensor:
    """Run a problem of one channel by the public function for chains (B, N), as (B, N, 2, 1)."""
    z = complex(problem.energy.item(), problem.eta.item())
    causal = problem.form != "two-sided"
    parts = resolvent_diagonal_parts(problem.v.squeeze(2), z, onsite=0.0, causal=causal)
    return parts.unsqueeze(3)


def growth(counts: Sequence[int]) -> Iterator[Result]:
    """Long chains, against short ones of the same volume: linear in N."""
    for form in ("g", "two-sided"):
        long, short = random_problem(form, LONG), random_problem(form, SHORT)
        truths = true_parts(long), true_parts(short)
        for count in counts:
            with torch_threads(count), torch.inference_mode():
                check_parts(long, long.run(), truths[0])
                check_parts(short, short.run(), truths[1])
                pair = interleaved(long.run, short.run)
            yield _growth_result(f"growth/{form}", count, pair)
        slopes = Gradient(long), Gradient(short)
        for count in counts:
            with torch_threads(count):
                for slope in slopes:
                    slope.check()
                pair = interleaved(*(slope.backward for slope in slopes))
            yield _growth_result(f"growth/backward/{form}", count, pair)


def _growth_result(name: str, count: int, pair: Sequence[float]) -> Result:
    own, short = pair
    baseline = f"N={SHORT[1]:,}"
    return Result(name, LONG, count, own, short, baseline, 1 / MOST_GROWTH)


def one_token(counts: Sequence[int]) -> Iterator[Result]:
    """One site of a stream: a call of `bkcore.kernels.sweep_step` from Python, start to end."""
    problem = random_problem("g+psi", ONE_TOKEN)
    truth = true_parts(problem)
    state = torch.zeros(1, 4, ONE_TOKEN[2])
    assert problem.source is not None
    v, source = problem.v[:, 0], problem.source[:, 0]
    call = partial(sweep_step, state, v, source, problem.energy, problem.eta, problem.hopping)
    for count in counts:
        state.zero_()
        check_parts(problem, call().unsqueeze(1), truth)
        with torch_threads(count):
            (seconds,) = interleaved(call)
        yield Result("one token/g+psi", ONE_TOKEN, count, seconds, STEP_SECONDS, "limit 6 us", 1.0)


def codes(counts: Sequence[int]) -> Iterator[Result]:
    """Integer codes to integer codes, against the float32 sweep of the numbers they stand for."""
    sizes = [("large", shape, LEAST_CODES_SPEEDUP) for shape in large_shapes()]
    for size, shape, target in [*sizes, ("cache", IN_CACHE, 1.0)]:
        for form in FORMS:
            problem = random_problem(form, shape)
            for bits, count in itertools.product((8, 4), counts):
                sweeps = CodedSweep(problem, bits)
                with torch_threads(count), torch.inference_mode():
                    sweeps.check()
                    own, floats = interleaved(sweeps.run, sweeps.decoded.run)
                name = f"codes/{size}/{form}/int{bits}"
                yield Result(name, shape, count, own, floats, "float32 sweep", target)
    for bits, count in itertools.product((8, 4), counts):
        shape = large_shapes()[0]
        uniform = CodedSweep(random_problem("g", shape), bits)
        levels = CodedSweep(random_problem("g", shape), bits, compand(bits))
        with torch_threads(count), torch.inference_mode():
            levels.check()
            own, plain = interleaved(levels.run, uniform.run)
        name = f"codes/levels/g/int{bits}"
        yield Result(name, shape, count, own, plain, "uniform codes", LEAST_LEVELS_SPEED)


def compand(bits: int) -> Tensor:
    """Levels that are closer together near zero."""
    codes = torch.arange(2.0**bits) - 2 ** (bits - 1)
    return codes.sign() * (codes / 2 ** (bits - 1)).abs() ** 1.5 * 2 ** (bits - 1)


class CodedSweep:
    """A problem whose potentials, sources and output are codes, with one scale per channel.

    Args:
        problem: what the codes are made from.
        bits: 8 or 4.
        levels: (2^bits,), ascending, for inputs and outputs; None for uniform codes.
    """

    def __init__(self, problem: Problem, bits: int, levels: Tensor | None = None) -> None:
        self._bits, self._levels = bits, levels
        inputs = [x for x in (problem.v, problem.source) if x is not None]
        outputs, lanes, device = 2 * len(inputs), problem.shape[2], problem.v.device
        largest = 2 ** (bits - 1) - 1
        in_shape, out_shape = (len(inputs), 1, lanes), (outputs, 1, lanes)
        self._in_scale = torch.full(in_shape, storable(3 / largest), device=device)
        self._out_scale = torch.full(out_shape, storable(2 / largest), device=device)
        self._zeros = torch.zeros_like(self._in_scale), torch.ones_like(self._out_scale)
        codes = [affine.quantize(x, self._in_scale[0, 0], 0, bits) for x in inputs]
        decoded = [affine.dequantize(self._level(q), self._in_scale[0, 0], 0) for q in codes]
        packed = [q.to(torch.int8) if bits == 8 else pack_int4(q.to(torch.int8)) for q in codes]
        has_source = problem.source is not None
        self._v, self._source = packed[0], packed[1] if has_source else None
        self.decoded = replace(problem, v=decoded[0], source=decoded[1] if has_source else None)

    def _level(self, code: Tensor) -> Tensor:
        if self._levels is None:
            return code
        return self._levels[code.long() + 2 ** (self._bits - 1)]

    def _quantize(self, parts: Tensor) -> Tensor:
        scale, zero = self._out_scale[0, 0], self._zeros[1][0, 0]
        if self._levels is None:
            return affine.quantize(parts, scale, zero, self._bits)
        bounds = (self._levels[:-1] + self._levels[1:]) / 2
        return torch.bucketize(parts / scale + zero, bounds) - 2 ** (self._bits - 1)

    def run(self) -> Tensor:
        def table(parts: int) -> Tensor | None:
            return None if self._levels is None else self._levels.expand(parts, -1)

        return sweep_codes(
            self._v,
            self._source,
            self.decoded.energy,
            self.decoded.eta.unsqueeze(0),
            self.decoded.hopping.unsqueeze(0),
            self._in_scale,
            self._zeros[0],
            self._out_scale,
            self._zeros[1],
            self._bits,
            self.decoded.form == "two-sided",
            in_levels=table(len(self._in_scale)),
            out_levels=table(len(self._out_scale)),
        )

    def check(self) -> None:
        """Check the float32 sweep, and that the codes are those of it, bit for bit."""
        parts = self.decoded.run()
        check_parts(self.decoded, parts, true_parts(self.decoded))
        wanted = self._quantize(parts).to(torch.int8)
        if self._bits == 4:
            wanted = pack_int4(wanted)
        if not torch.equal(self.run(), wanted):
            raise BenchmarkError(
                f"wrong result: codes of {self._bits} bits, {self.decoded.form}, shape "
                f"{self.decoded.shape}, differ from those of the float32 sweep"
            )


def storable(scale: float) -> float:
    """A scale as quantizers store it."""
    return affine.storable(torch.tensor(scale)).item()


def _time_forward(problem: Problem, truth: Tensor, count: int, *baselines: Call) -> Sequence[float]:
    """Seconds of the sweep, after a check of its result, and of the baselines."""
    with torch_threads(count), torch.inference_mode():
        check_parts(problem, problem.run(), truth)
        return interleaved(problem.run, *baselines)


CASES = [
    Case("large", large),
    Case("fresh memory", fresh_memory),
    Case("cache", in_cache),
    Case("backward", backward),
    Case("one lane", one_lane),
    Case("layout", layouts),
    Case("growth", growth),
    Case("one token", one_token),
    Case("codes", codes),
    Case("comparison", comparison),
]
