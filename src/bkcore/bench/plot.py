"""The figures as a picture."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bkcore.bench.engine_rows import Row
from bkcore.bench.memory import Point
from bkcore.bench.result import Result
from bkcore.display.plots import write_plot

_COLORS = {"float32": "tab:gray", "INT8": "tab:blue", "INT4": "tab:orange"}


def draw(results: Sequence[Result], path: Path) -> None:
    """Draw time against N, with the rivals, and each group's worst ratio over its target."""
    from matplotlib.figure import Figure

    worst = _worst_ratios([result for result in results if result.target is not None])
    heights = [5.0, 1.0 + 0.17 * len(worst)]
    figure = Figure(figsize=(8, sum(heights)), layout="constrained")
    above, below = figure.subplots(2, 1, height_ratios=heights)
    _draw_series(above, [result for result in results if result.name == "comparison"])
    _draw_targets(below, worst)
    write_plot(figure, path)


def draw_memory(points: Sequence[Point], path: Path) -> None:
    """Draw peak memory and time against N, each with a line that is linear in N."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    _draw_growth(left, points, lambda point: point.peak_bytes / 1e6, "peak memory, MB")
    _draw_growth(right, points, lambda point: point.seconds, "seconds")
    write_plot(figure, path)


def draw_engines(rows: Sequence[Row], path: Path) -> None:
    """Draw tokens a second against parameters: one sequence after 512 tokens, on one thread."""
    from matplotlib.figure import Figure

    lines: dict[tuple[str, str, str], set[tuple[int, float]]] = defaultdict(set)
    for row in rows:
        if (row.work, row.context, row.threads) == ("decode", 512, 1):
            style = "D:" if row.model.endswith("dense") else "o-"
            for side, look in ((row.own, style), (row.other, "s--")):
                if side is not None:
                    name = f"{side.engine}, dense" if look == "D:" else side.engine
                    point = side.parameters, side.tokens_per_second
                    lines[name, look, _COLORS[row.format]].add(point)
    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    for (name, look, color), points in lines.items():
        axes.loglog(*zip(*sorted(points), strict=True), look, label=name, color=color)
    axes.set(xlabel="parameters", ylabel="tokens a second, one thread, after 512 tokens")
    if lines:
        sizes = [size for points in lines.values() for size, _ in points]
        axes.set_xlim(min(sizes) / 2, max(sizes) * 2)
        axes.legend()
    write_plot(figure, path)


def _draw_growth(
    axes: Any, points: Sequence[Point], value: Callable[[Point], float], label: str
) -> None:
    lines: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for point in points:
        lines[point.kind].append((point.length, value(point)))
    for kind, line in lines.items():
        axes.loglog(*zip(*line, strict=True), "o-", label=kind, base=2)
    last = max((line[-1] for line in lines.values()), key=lambda end: end[1])
    shortest = min(point.length for point in points)
    ends = [shortest, last[0]]
    linear = [2 * last[1] * end / last[0] for end in ends]
    axes.loglog(ends, linear, "--", color="gray", label="linear in N", base=2)
    lengths = sorted({point.length for point in points})
    axes.set_xticks(lengths, labels=[f"{length // 1024}k" for length in lengths])
    axes.set_yscale("log", base=10)
    axes.set(xlabel="tokens N", ylabel=label)
    axes.legend()


def _draw_series(axes: Any, results: Sequence[Result]) -> None:
    lines: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for result in results:
        sites = result.shape[-1]
        lines[result.baseline].append((sites, result.baseline_seconds * 1e3))
    ours = {result.shape[-1]: result.seconds * 1e3 for result in results}
    lines["bkcore"] = sorted(ours.items())
    for name, points in lines.items():
        if points:
            axes.loglog(*zip(*points, strict=True), "o-", label=name)
    axes.set(xlabel="sites N", ylabel="ms a call", title="two-sided diagonal, 16 chains")
    if results:
        axes.legend()


def _worst_ratios(results: Sequence[Result]) -> dict[str, float]:
    worst: dict[str, float] = {}
    for result in results:
        assert result.target is not None
        name = f"{result.name} ({result.threads})"
        worst[name] = min(result.ratio / result.target, worst.get(name, float("inf")))
    return worst


def _draw_targets(axes: Any, worst: dict[str, float]) -> None:
    names = list(worst)[::-1]
    colors = ["tab:green" if worst[name] >= 1 else "tab:red" for name in names]
    axes.set_xscale("log")
    axes.barh(names, [worst[name] - 1 for name in names], left=1, color=colors)
    ticks = [0.1, 0.2, 0.5, 1, 2, 5, 10]
    axes.set_xticks(ticks, labels=map(str, ticks))
    axes.minorticks_off()
    axes.tick_params(axis="y", labelsize=8)
    axes.margins(y=0.01)
    axes.set(xlabel="ratio / target, 1 or more: met", title="worst shape of each case (threads)")
