"""`bkcore train`: train a tokenizer and a model on a text by a recipe, and save them."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import rich.console
import torch
import typer
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from bkcore.commands.files import Files
from bkcore.commands.options import DataOption, PlotOption
from bkcore.commands.process import keeping, use_free_cores
from bkcore.display.console import Console, bits_per_byte, number, say
from bkcore.display.plots import write_plot
from bkcore.outputs import prepare_file, prepare_folder, write_json

if TYPE_CHECKING:
    from bkcore.evaluation.perplexity import Protocol, Scores
    from bkcore.training.recipe import Recipe

CACHE = "cache"
MODEL = "model"
REPORT = "training.json"


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
    from bkcore.training.recipe import read_recipe

    folder = output or Path("runs") / config.stem
    console = Console()
    Files(plot=plot).prepare({"--output": folder}, [config, data])
    use_free_cores()
    with keeping(f"{folder} keeps the checkpoints; the same command continues from the last"):
        report = run_training(read_recipe(config), data, folder, resume, console)
    if plot is not None:
        draw_curve(report, plot)


def run_training(
    recipe: Recipe,
    data: str | Path | None,
    output: Path,
    resume: bool,
    console: rich.console.Console,
) -> dict[str, Any]:
    """Train a tokenizer and a model, and save the model that did best on the validation split.

    Under `torchrun`, every process takes its share of each batch, and the first one prints and
    writes. Afterwards `output` holds `model`, a checkpoint with its tokenizer; `training.json`, the
    report; `cache`, the tokenizer and the token ids; and the folders from which a killed training
    resumes.

    Args:
        recipe: sizes and lengths.
        data: as in `bkcore.text.open_corpus`.
        output: folder for all results.
        resume: continue an earlier training there; False deletes its checkpoints and starts afresh.
        console: for the progress bar.

    Returns:
        The report: `curve`, the training losses and evaluations by step; `best`, the evaluation of
        the saved model; `protocol` of the evaluations; `recipe`, `corpus`, `parameters`, and
        `training_tokens` (a step's tokens times the steps done).

    Raises:
        DataError: if the text is missing, unreadable or too small; raised before any training.
        InputError: if `output` cannot be written; raised before any training.
        OutputError: if the report cannot be written.
        CheckpointError: if `output` holds a training by another recipe or on another text, or the
            disk is full.
    """
    from accelerate import PartialState

    from bkcore.evaluation.judging import Judge, save_checkpoint
    from bkcore.evaluation.perplexity import Protocol
    from bkcore.evaluation.samples import samples_of
    from bkcore.model import LanguageModel
    from bkcore.text import (
        TokenWindows,
        cached_tokenizer,
        cached_tokens,
        count_words,
        encode,
        open_corpus,
        origin_of,
        tokenizer_hash,
    )
    from bkcore.training import trainer

    process = PartialState(cpu=True)
    if process.is_main_process:
        for folder in (output, output / CACHE, output / MODEL):
            prepare_folder(folder)
        prepare_file(output / REPORT)
    corpus = open_corpus(data)
    with process.main_process_first():
        tokenizer = cached_tokenizer(
            corpus, recipe.vocab_size, output / CACHE, min_frequency=recipe.min_frequency
        )
        tokens = cached_tokens(corpus, tokenizer, output / CACHE)
    valid = encode(tokenizer, corpus.valid)
    protocol = Protocol(
        tokenizer_hash(tokenizer),
        "valid",
        recipe.window,
        len(valid),
        count_words(corpus.valid),
        len(corpus.valid.encode()),
        recipe.evaluation_batch_size,
    )
    torch.manual_seed(recipe.seed)
    model = LanguageModel(vocab_size=len(tokenizer), n_seq=recipe.window, **recipe.model)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    tokens_a_step = recipe.schedule.batch_size * recipe.window
    windows = TokenWindows(tokens, recipe.window)
    judge = Judge(valid, recipe.window, recipe.evaluation_batch_size, tokenizer.bos_token_id)
    display = _Display(recipe.schedule.steps, tokens_a_step, console, process.is_main_process)
    with display:
        curve = trainer.train(
            model,
            windows,
            recipe.schedule,
            seed=recipe.seed,
            output=output,
            resume=resume,
            evaluation=lambda trained: _evaluation(judge(trained), protocol),
            on_step=display.on_step,
            on_log=display.on_log,
        )
    curve = [_complete(entry) for entry in curve]
    evaluations = [entry for entry in curve if "eval_loss" in entry]
    report = {
        "best": min(evaluations, key=lambda entry: entry["eval_loss"]),
        "training_tokens": int(curve[-1]["step"]) * tokens_a_step,
        "parameters": parameters,
        "corpus": corpus.name,
        "protocol": protocol.as_dict(),
        "recipe": recipe.as_dict(),
        "curve": curve,
    }
    if process.is_main_process:
        model.config.training_text = origin_of(corpus)
        save_checkpoint(output / MODEL, model, tokenizer, samples_of(windows))
        write_json(report, output / REPORT)
        say(console, _summary(report, output))
    process.wait_for_everyone()
    return report


def _evaluation(scores: Scores, protocol: Protocol) -> dict[str, float]:
    """Loss and perplexities of the validation split."""
    from bkcore.evaluation.rows import perplexities

    found = {
        "loss": scores.total_nll / scores.total_tokens,
        **perplexities(scores, protocol),
    }
    # The Trainer writes all values as JSON, which has no infinities, so leave those out.
    return {name: value for name, value in found.items() if math.isfinite(value)}


def _complete(entry: dict[str, float]) -> dict[str, float]:
    """A log entry with the perplexities that were left out because they are infinite."""
    if "eval_loss" not in entry:
        return entry
    infinite = dict.fromkeys(("eval_ppl_token", "eval_ppl_word"), math.inf)
    return {**infinite, **entry}


def _perplexities(entry: dict[str, float], bits: str = "") -> str:
    """The perplexities for a line; older versions of bkcore did not record those per byte."""
    return (
        f"perplexity {number(entry['eval_ppl_token'], '.2f')} per token{bits}, "
        f"{number(entry['eval_ppl_word'], '.2f')} per word, "
        f"{bits_per_byte(entry.get('eval_ppl_byte'))} bits per byte"
    )


@dataclass
class _Display:
    """A bar with step, loss, speed and last perplexity; silent if not `shown`."""

    steps: int
    tokens_a_step: int
    console: rich.console.Console
    shown: bool
    values: dict[str, str] = field(default_factory=dict)

    def __enter__(self) -> _Display:
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.shown,
            speed_estimate_period=120,
            transient=True,
        )
        self._task = self._progress.add_task("training", total=self.steps)
        self._progress.start()
        self._start, self._first = time.monotonic(), -1
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def on_step(self, step: int) -> None:
        """Move the bar; speed is measured from the first step of this process."""
        if self._first < 0:
            self._start, self._first = time.monotonic(), step
            self._progress.reset(self._task, total=self.steps, completed=step - 1)
            if step > 1:
                self._say(f"resumed after step {step - 1}")
        else:
            tokens = (step - self._first) * self.tokens_a_step
            self.values["speed"] = f"{tokens / (time.monotonic() - self._start):,.0f} tokens/s"
        self._progress.update(
            self._task, completed=step, description="  ".join(self.values.values()) or "training"
        )

    def on_log(self, entry: dict[str, float]) -> None:
        """Show a loss; print a line for an evaluation, so that a log file has it too."""
        if "loss" in entry:
            self.values["loss"] = f"loss {entry['loss']:.3f}"
        else:
            entry = _complete(entry)
            self.values["valid"] = f"valid ppl {number(entry['eval_ppl_token'], '.2f')}"
            self._say(
                f"step {entry['step']:,.0f}  {self.values.get('loss', '')}  valid: "
                f"{_perplexities(entry)}"
            )

    def _say(self, line: str) -> None:
        if self.shown:
            say(self.console, line)


def _summary(report: dict[str, Any], output: Path) -> str:
    """The line at the end of a training."""
    best = report["best"]
    bits = f" ({best['eval_loss'] / math.log(2):.3f} bits)"
    found = _perplexities(best, bits)
    return f"best at step {best['step']:,.0f}: {found}. Model: {output / MODEL}"


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
