"""`bkcore train`: train a tokenizer and a model on a text by a recipe, and save them."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from bkcore.commands.files import Files
from bkcore.commands.options import DataOption, PlotOption
from bkcore.commands.running import keeping, start_work, use_free_cores
from bkcore.display.console import Console
from bkcore.display.plots import write_plot
from bkcore.training.recipe import read_recipe


def train(
    config: Annotated[Path, typer.Option(help="Recipe in YAML, such as configs/wikitext2.yaml.")],
    data: DataOption = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder for all results; default: runs/NAME-OF-RECIPE.")
    ] = None,
    resume: Annotated[
        bool, typer.Option(help="Continue an earlier training there, or delete its checkpoints.")
    ] = True,
    plot: PlotOption = None,
) -> None:
    """Train a language model by a recipe; the same command resumes a killed training."""
    folder = output or Path("runs") / config.stem
    console, files = Console(), Files(plot=plot)
    files.prepare({"--output": folder}, data=data, read=[config])
    recipe = read_recipe(config)
    start_work()
    from bkcore.commands.train_steps import run_training

    use_free_cores()
    with keeping(f"{folder} keeps the checkpoints; the same command continues from the last"):
        report = run_training(recipe, data, folder, resume, console)
    files.publish(lambda: None, report, draw=partial(draw_curve, report))


def draw_curve(report: dict[str, Any], path: Path) -> None:
    """Draw the losses and perplexities of a training report against the tokens.

    Args:
        report: the result of `run_training`.
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
