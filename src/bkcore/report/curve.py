"""The curve of a training as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bkcore.report.files import write_plot


def draw_curve(report: dict[str, Any], path: Path) -> None:
    """Draw the losses of a report of `bkcore train` against the tokens, and its perplexities.

    Args:
        report: what `run_training` returns.
        path: a .png or .svg file.
    """
    from matplotlib.figure import Figure

    schedule = report["recipe"]["schedule"]
    tokens_a_step = schedule["batch_size"] * report["recipe"]["window"]
    training = [entry for entry in report["curve"] if "loss" in entry]
    evaluations = [entry for entry in report["curve"] if "eval_loss" in entry]
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(*_series(training, "loss", tokens_a_step), label="training, balancing included")
    left.plot(*_series(evaluations, "eval_loss", tokens_a_step), "o-", label="validation")
    left.set(xlabel="million tokens", ylabel="nats per token")
    left.legend()
    right.semilogy(*_series(evaluations, "eval_ppl_word", tokens_a_step), "o-")
    right.set(xlabel="million tokens", ylabel="validation perplexity per word")
    right.grid(visible=True, which="both", alpha=0.3)
    write_plot(figure, path)


def _series(
    entries: list[dict[str, float]], name: str, tokens_a_step: int
) -> tuple[list[float], list[float]]:
    steps = [entry["step"] * tokens_a_step / 1e6 for entry in entries]
    return steps, [entry[name] for entry in entries]
