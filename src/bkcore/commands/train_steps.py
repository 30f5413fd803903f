"""The steps of `bkcore train`, from a recipe and a text to a saved model and its report."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from bkcore.commands.files import say_what_is_replaced
from bkcore.display.console import bits_per_byte, number, say
from bkcore.evaluation.checkpoints import save_checkpoint
from bkcore.evaluation.evaluate import Scorer
from bkcore.evaluation.perplexity import Protocol
from bkcore.evaluation.rows import perplexities
from bkcore.evaluation.samples import samples_of
from bkcore.model import LanguageModel, ResNetBKForCausalLM
from bkcore.outputs import prepare_file, prepare_folder, write_json
from bkcore.text import (
    StreamedCorpus,
    TokenWindows,
    cached_tokenizer,
    cached_tokens,
    count_words,
    encode,
    open_corpus,
    origin_of,
    tokenizer_hash,
)
from bkcore.training import resuming, trainer
from bkcore.training.recipe import Recipe

CACHE = "cache"
MODEL = "model"
REPORT = "training.json"


def run_training(
    recipe: Recipe,
    data: str | Path | None,
    output: Path,
    resume: bool,
    console: Console,
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
    process = PartialState(cpu=True)
    if process.is_main_process:
        _prepare(output)
        is_continued = resume and resuming.newest(output) is not None
        if not is_continued:  # otherwise the model there is of this training
            say_what_is_replaced(console, [output / MODEL])
    text = _read_text(recipe, data, output / CACHE, process)
    validation = _validation(text, recipe)
    torch.manual_seed(recipe.seed)
    model = LanguageModel(vocab_size=len(text.tokenizer), n_seq=recipe.window, **recipe.model)
    display = _Display(
        recipe.schedule.steps, recipe.tokens_a_step, console, process.is_main_process
    )
    with display:
        curve = trainer.train(
            model,
            text.windows,
            recipe.schedule,
            seed=recipe.seed,
            output=output,
            resume=resume,
            evaluation=validation,
            on_step=display.on_step,
            on_log=display.on_log,
        )
    report = _report(recipe, text, model, validation.protocol, list(map(_complete, curve)))
    if process.is_main_process:
        model.config.training_text = origin_of(text.corpus)
        save_checkpoint(output / MODEL, model, text.tokenizer, samples_of(text.windows))
        write_json(report, output / REPORT)
        if not display.has_stepped:
            say(console, f"the training in {output} was finished before; nothing was left to do")
        say(console, _summary(report, output))
    process.wait_for_everyone()
    return report


def _prepare(output: Path) -> None:
    """Raise `InputError` if something cannot be written later."""
    for folder in (output, output / CACHE, output / MODEL):
        prepare_folder(folder)
    prepare_file(output / REPORT)


@dataclass(frozen=True)
class _Text:
    """A text, its tokenizer, the windows to train on, and the token ids to validate on."""

    corpus: StreamedCorpus
    tokenizer: PreTrainedTokenizerFast
    windows: TokenWindows
    valid: Tensor


def _read_text(
    recipe: Recipe, data: str | Path | None, cache: Path, process: PartialState
) -> _Text:
    """Train the tokenizer and encode the text, or take both from the cache."""
    corpus = open_corpus(data)
    with process.main_process_first():
        tokenizer = cached_tokenizer(
            corpus, recipe.vocab_size, cache, min_frequency=recipe.min_frequency
        )
        tokens = cached_tokens(corpus, tokenizer, cache)
    valid = encode(tokenizer, corpus.valid)
    return _Text(corpus, tokenizer, TokenWindows(tokens, recipe.window), valid)


@dataclass(frozen=True)
class _Validation:
    """Evaluates a model on the validation split, by a protocol."""

    scorer: Scorer
    protocol: Protocol

    def __call__(self, model: PreTrainedModel) -> dict[str, float]:
        scores = self.scorer(model)
        found = {
            "loss": scores.total_nll / scores.total_tokens,
            **perplexities(scores, self.protocol),
        }
        # The Trainer writes all values as JSON, which has no infinities, so leave those out.
        return {name: value for name, value in found.items() if math.isfinite(value)}


def _validation(text: _Text, recipe: Recipe) -> _Validation:
    size, bos_id = recipe.evaluation_batch_size, text.tokenizer.bos_token_id
    protocol = Protocol(
        tokenizer_hash(text.tokenizer),
        "valid",
        recipe.window,
        len(text.valid),
        count_words(text.corpus.valid),
        len(text.corpus.valid.encode()),
        size,
    )
    return _Validation(Scorer(text.valid, recipe.window, size, bos_id), protocol)


def _report(
    recipe: Recipe,
    text: _Text,
    model: ResNetBKForCausalLM,
    protocol: Protocol,
    curve: list[dict[str, float]],
) -> dict[str, Any]:
    """What `run_training` returns."""
    evaluations = [entry for entry in curve if "eval_loss" in entry]
    return {
        "best": min(evaluations, key=lambda entry: entry["eval_loss"]),
        "training_tokens": int(curve[-1]["step"]) * recipe.tokens_a_step,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "corpus": text.corpus.name,
        "protocol": protocol.as_dict(),
        "recipe": recipe.as_dict(),
        "curve": curve,
    }


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
    console: Console
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

    @property
    def has_stepped(self) -> bool:
        """Whether this process did a step of the training."""
        return self._first >= 0

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
