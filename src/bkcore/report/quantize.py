"""Quantizing a checkpoint: calibration on the training text, never on what models are judged by."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from bkcore.errors import DataError, InputError, ReceiptError
from bkcore.evaluation.checkpoints import load_checkpoint, save_checkpoint
from bkcore.evaluation.samples import SAMPLE_TOKENS, load_samples
from bkcore.evaluation.sensitivity import Sensitivity, measure, units
from bkcore.model import ResNetBKForCausalLM
from bkcore.model.receipt import problems, problems_of_calibration, problems_of_size
from bkcore.outputs import prepare_folder
from bkcore.quantization.budget import Assignment, total_loss
from bkcore.quantization.config import QuantizationConfig
from bkcore.report.budget import Judge, Search, check_target
from bkcore.report.console import warn
from bkcore.report.files import refuse_model
from bkcore.report.progress import Plan
from bkcore.text import (
    TokenWindows,
    encode,
    is_part_of,
    load_split,
    spread,
    warning_of_other_text,
)
from bkcore.training import Schedule, train

_TOKENS_A_BATCH = 4096
_SENSITIVITY_TOKENS = 8192
_LEARNING_RATE = 1e-4
_READINGS = 10
"""Of each window that is learned from a teacher, who is asked at the first one only."""

UNIFORM_MODES = ("ptq_int8", "ptq_int4", "mixed_precision")
"""What the frontier of a bit budget is compared with."""


@dataclass(frozen=True)
class QuantizeSettings:
    """How a checkpoint is quantized.

    Attributes:
        mode: as in `QuantizationConfig`.
        group_size: inputs of an INT4 weight that share a scale, None is 128; the INT8 modes have a
            scale per row and take none.
        min_size: weights with fewer numbers stay in float16, as in `QuantizationConfig`; None is
            its default. QAT and a bit budget decide for themselves and take none.
        calibration_tokens: tokens of the training text to calibrate on, in windows of the length
            of the model's training; at least one window is taken.
        steps: of training, which the QAT modes need and the others do not have.
        learning_rate: the peak of that training; None is 1e-4.
        distill: whether that training is towards the next-token distributions of the float
            checkpoint, which None is in a QAT mode, or, if False, towards the text's tokens.
        strict: refuse a model that is not, tensor for tensor, what its mode promises.
        target_bits: bits of a weight on average over all weights that modes quantize
            (projections, experts, embedding), scales included; at most so many.
        max_increase: percent by which perplexity on held-out training text may rise, the upper
            end of its 95 % interval; the smallest model is taken.
        frontier: measure models of all sizes beside the one that is saved, and the uniform modes.

    Raises:
        InputError: for an unknown mode or group size, a QAT mode without steps, something that is
            said of training without a QAT mode, an increase or a rate that is not positive, a
            min_size where it has no effect, or a bit budget in another mode than mixed precision.
    """

    mode: str = QuantizationConfig.PTQ_INT8
    group_size: int | None = None
    min_size: int | None = None
    calibration_tokens: int = SAMPLE_TOKENS
    steps: int | None = None
    learning_rate: float | None = None
    distill: bool | None = None
    strict: bool = False
    target_bits: float | None = None
    max_increase: float | None = None
    frontier: bool = False

    def __post_init__(self) -> None:
        if self.config.is_qat and self.steps is None:
            raise InputError(
                f"mode {self.mode!r} trains: say for how long with --steps; a tenth of the steps "
                "of the float training is plenty"
            )
        of_training = {
            "--steps": self.steps,
            "--learning-rate": self.learning_rate,
            "--distill and no --no-distill": self.distill,
        }
        for option, value in of_training.items():
            if not self.config.is_qat and value is not None:
                raise InputError(f"mode {self.mode!r} does not train, and takes no {option}")
        if self.steps is not None:
            self.schedule(window=1)  # refuses a rate that cannot be
        if self.group_size is not None and self.mode.endswith("int8"):
            raise InputError(
                f"mode {self.mode!r} has a scale for each row of a weight: it takes no --group-size"
            )
        if self.min_size is not None and (self.config.is_qat or self.has_budget):
            raise InputError(
                "in the QAT modes all weights are codes, and a bit budget gives each its bits, "
                "whatever their size: they take no --min-size"
            )
        if self.target_bits is not None and self.max_increase is not None:
            raise InputError("give --target-bits or --max-ppl-increase, not both")
        if self.target_bits is not None and not 0 < self.target_bits <= 16:
            raise InputError(
                f"--target-bits must be positive and at most 16, not {self.target_bits:g}"
            )
        if self.max_increase is not None and not self.max_increase > 0:
            raise InputError(f"--max-ppl-increase must be positive, not {self.max_increase:g} %")
        if self.frontier and not self.has_budget:
            raise InputError("--frontier needs --target-bits or --max-ppl-increase")
        if self.has_budget and self.mode != QuantizationConfig.MIXED_PRECISION:
            raise InputError(
                f"a bit budget mixes precisions: it goes with mode 'mixed_precision', whose core "
                f"is INT8, not with {self.mode!r}"
            )

    @property
    def config(self) -> QuantizationConfig:
        """The choice that the model gets."""
        given: dict[str, Any] = {"group_size": self.group_size, "min_size": self.min_size}
        chosen = {name: value for name, value in given.items() if value is not None}
        return QuantizationConfig(self.mode, **chosen)

    @property
    def has_budget(self) -> bool:
        """Whether bits are given to weights one by one."""
        return self.target_bits is not None or self.max_increase is not None

    @property
    def needs_text(self) -> bool:
        """Whether more of the text is needed than calibration takes by default."""
        more = self.calibration_tokens > SAMPLE_TOKENS
        return more or self.has_budget or self.steps is not None

    def schedule(self, window: int) -> Schedule:
        """Length and speed of the training in a QAT mode, with windows of so many tokens."""
        assert self.steps is not None
        return Schedule(
            steps=self.steps,
            batch_size=_windows(_TOKENS_A_BATCH, window),
            learning_rate=_LEARNING_RATE if self.learning_rate is None else self.learning_rate,
            warmup_fraction=0.1,
            weight_decay=0.0,
        )


def run_quantize(
    checkpoint: Path,
    output: Path,
    data: str | Path | None,
    settings: QuantizeSettings,
    console: Console,
    control: Path | None = None,
) -> dict[str, Any]:
    """Quantize a float checkpoint and save it with its tokenizer and its receipt.

    Args:
        checkpoint: folder with a float model and its tokenizer.
        output: folder to write, another one.
        data: the text to calibrate on, as in `bkcore.text.load_split`. None takes the samples of
            its training text that the checkpoint holds, or the embedded corpus if it was trained on
            that.
        settings: how.
        console: where progress is drawn.
        control: folder to save the float model in after as many steps on the text as a QAT mode
            trained; None does not train it.

    Returns:
        `receipt`, see `bkcore.model.receipt.of_quantized`; `corpus`, the name of the text;
        `calibration_tokens`, how many of its tokens calibration saw; and `warning`, None unless the
        text is not the one that the model was trained on.
        With a bit budget also `sensitivity`, a list of `Sensitivity`; `assignment`, the `Choice`
        of each unit; and `points`, rows of `Search.point`: the model that was saved comes first.

    Raises:
        InputError: if the checkpoint is not float, two folders are the same, one to write holds a
            float model, no model is within the budget, there is a control in a mode that does not
            train, or `data` is None and the checkpoint cannot do without.
        CheckpointError: if it cannot be loaded, or `output` not written.
        DataError: if the text is missing, unreadable or too small.
        ReceiptError: if `settings.strict` finds something; nothing is written then.
    """
    _check_folders(checkpoint, output, control)
    if control is not None and settings.steps is None:
        raise InputError(f"mode {settings.mode!r} does not train: there is nothing to control for")
    model, tokenizer = load_float(checkpoint)
    text = _text(checkpoint, model, data, settings)
    if text.warning is not None:
        warn(console, text.warning)
    with Plan(_stages(settings, control), console) as plan:
        with plan.stage("read text"):
            tokens = encode(tokenizer, text.content) if text.samples is None else text.samples
            windows = TokenWindows(tokens.flatten(), model.config.n_seq)
        run = _Run(checkpoint, windows, tokenizer, settings, plan)
        run.check(model)
        model, result = run.with_budget(model) if settings.has_budget else run.by_mode(model)
        assert model.receipt is not None
        if settings.strict:
            check_strictly(problems(model.receipt))
        save_checkpoint(output, model, tokenizer)
        if control is not None:
            other, _ = load_float(checkpoint)
            run.train(other, "train the control", run.windows)
            save_checkpoint(control, other, tokenizer)
    return {
        "receipt": model.receipt,
        "corpus": text.name,
        "calibration_tokens": run.calibration_tokens,
        "warning": text.warning,
        **result,
    }


class _Text(NamedTuple):
    """What a checkpoint is quantized with: the content of a text, or samples of one."""

    name: str
    content: str
    samples: Tensor | None
    warning: str | None


def _text(
    checkpoint: Path,
    model: ResNetBKForCausalLM,
    data: str | Path | None,
    settings: QuantizeSettings,
) -> _Text:
    """The text that was named, or what the checkpoint brings.

    Raises:
        DataError: as in `bkcore.text.load_split`.
        InputError: if none was named, and what the checkpoint brings does not do.
    """
    origin = model.config.training_text
    if data is not None:
        name, content = load_split(data, "train")
        warning = warning_of_other_text(origin, data, name, "train", content)
        return _Text(name, content, None, warning)
    samples = load_samples(checkpoint, model.config.vocab_size)
    if origin is not None and samples is not None and not settings.needs_text:
        return _Text(f"{origin['name']}, samples in the checkpoint", "", samples, None)
    name, content = load_split(None, "train")
    if is_part_of(origin, "train", content):
        return _Text(name, content, None, None)
    known = "does not say what it was trained on"
    if origin is not None:
        known = f"was trained on {origin['name']}"
        if samples is not None:
            known += f", of which it holds {samples.numel():,} tokens, and this takes more"
    raise InputError(f"the model in {checkpoint} {known}: name its text with --data")


def _check_folders(checkpoint: Path, output: Path, control: Path | None) -> None:
    """Raise `InputError` if two of them are one, a float model would be lost, or one to write
    cannot be written in."""
    if output.resolve() == checkpoint.resolve():
        raise InputError(f"{output} is the checkpoint itself; name another folder")
    if control is not None and control.resolve() in (checkpoint.resolve(), output.resolve()):
        raise InputError(f"the control needs a folder of its own, not {control}")
    for folder in (output, control):
        if folder is not None:
            refuse_model(folder)
            prepare_folder(folder)


def check_strictly(found: Sequence[str]) -> None:
    """Raise `ReceiptError`, which has every problem that was found, unless there is none."""
    if found:
        raise ReceiptError("--strict: " + "; ".join(found))


def load_float(checkpoint: Path) -> tuple[ResNetBKForCausalLM, PreTrainedTokenizerFast]:
    """Load a float model and its tokenizer.

    Raises:
        InputError: if it is quantized.
        CheckpointError: if either is missing or damaged.
    """
    model, tokenizer = load_checkpoint(checkpoint)
    if model.quantization_state != "float":
        raise InputError(
            f"{checkpoint} is {model.quantization_state.value}; "
            "quantize the float checkpoint it was made from"
        )
    return model, tokenizer


def _stages(settings: QuantizeSettings, control: Path | None) -> dict[str, float]:
    """Stages and about how long each takes."""
    stages = {"read text": 5.0, "calibrate": 5.0}
    if settings.steps is not None:
        stages["train"] = (1.0 if settings.distill is False else 1.1) * settings.steps
        if control is not None:
            stages["train the control"] = 1.0 * settings.steps
    if settings.has_budget:
        stages |= {"measure sensitivity": 100.0, "spend the budget": 20.0}
    if settings.frontier:
        stages["measure the frontier"] = 80.0
    return stages


@dataclass
class _Run:
    """What the ways to quantize share."""

    checkpoint: Path
    windows: TokenWindows
    tokenizer: PreTrainedTokenizerFast
    settings: QuantizeSettings
    plan: Plan

    @property
    def length(self) -> int:
        return self.windows[0]["input_ids"].numel()

    @property
    def batch_size(self) -> int:
        return _windows(_TOKENS_A_BATCH, self.length)

    @property
    def calibration_windows(self) -> int:
        return _windows(self.settings.calibration_tokens, self.length)

    @property
    def calibration_tokens(self) -> int:
        return sum(batch.numel() for batch in self._calibration_batches())

    def check(self, model: ResNetBKForCausalLM) -> None:
        """Raise an error before the work where it would be raised after it."""
        settings = self.settings
        if settings.steps is not None and len(self.windows) < self.batch_size:
            raise DataError(
                f"the training text has {len(self.windows)} windows of {self.length} tokens, and a "
                f"step of training takes {self.batch_size}; give more text"
            )
        if settings.target_bits is not None:
            check_target(model, settings.target_bits, settings.config.group_size)
        if settings.has_budget and len(self._judge().tokens) < 2 * self.length:
            raise InputError(
                f"a bit budget is judged on as many windows as calibration takes, which is one of "
                f"{self.length} tokens, and one tells nothing about the spread: allow more "
                "--calibration-tokens, or give more text"
            )
        if settings.strict and not settings.has_budget:
            check_strictly(problems_of_size(model, settings.config))

    def _check_calibration(self, model: ResNetBKForCausalLM) -> None:
        """With --strict, raise `ReceiptError` for what calibration did not reach."""
        if self.settings.strict and model.receipt is not None:
            check_strictly(problems_of_calibration(model.receipt["calibration"]))

    def by_mode(self, model: ResNetBKForCausalLM) -> tuple[ResNetBKForCausalLM, dict[str, Any]]:
        with self.plan.stage("calibrate"):
            self._quantize(model, self.settings.config)
        if self.settings.steps is not None:
            self._check_calibration(model)
            windows, teacher = self.windows, None
            if self.settings.distill is not False:
                windows, teacher = self._few_windows(), load_float(self.checkpoint)[0]
            log = self.train(model, "train", windows, teacher)
            model.convert()
            assert model.receipt is not None
            model.receipt["training"] = self._training_entry(len(windows), log)
        return model, {}

    def _training_entry(self, windows: int, log: list[dict[str, float]]) -> dict[str, Any]:
        """What the receipt says of the training in a QAT mode."""
        schedule = self.settings.schedule(self.length)
        return {
            "steps": schedule.steps,
            "windows": windows,
            "batch_size": schedule.batch_size,
            "window": self.length,
            "learning_rate": schedule.learning_rate,
            "distilled": self.settings.distill is not False,
            "first_loss": log[0]["loss"],
            "last_loss": log[-1]["loss"],
        }

    def train(
        self,
        model: ResNetBKForCausalLM,
        stage: str,
        windows: TokenWindows,
        teacher: ResNetBKForCausalLM | None = None,
    ) -> list[dict[str, float]]:
        schedule = self.settings.schedule(self.length)
        origin = model.config.training_text
        with self.plan.stage(stage) as advance:
            log = train(
                model,
                windows,
                schedule,
                teacher=teacher,
                on_step=lambda step: advance(step / schedule.steps),
            )
        model.config.training_text = origin  # a few steps more do not make another model
        return log

    def _few_windows(self) -> TokenWindows:
        """So many, spread over the text, that each is read about ten times."""
        schedule = self.settings.schedule(self.length)
        count = max(schedule.batch_size, schedule.steps * schedule.batch_size // _READINGS)
        return TokenWindows(spread(self.windows, count).flatten(), self.length)

    def with_budget(self, model: ResNetBKForCausalLM) -> tuple[ResNetBKForCausalLM, dict[str, Any]]:
        settings = self.settings
        with self.plan.stage("calibrate"):
            # Any weight may become INT4, and is calibrated for that.
            every = {name: 4 for names in units(model).values() for name in names}
            model.configure_quantization(replace(settings.config, tensor_bits=every))
            model.start_calibration()
            with torch.no_grad():
                for batch in self._calibration_batches():
                    model(batch)
            model.end_calibration()
            self._check_calibration(model)
        with self.plan.stage("measure sensitivity") as advance:
            ids = torch.cat(self._calibration_batches())
            some = ids[:: max(1, ids.numel() // _SENSITIVITY_TOKENS)]
            batches = some.split(self.batch_size)
            found = measure(model, settings.config, batches, on_progress=advance)
        with self.plan.stage("spend the budget") as advance:
            search = Search(model, found, self._judge())
            quantized, assignment = self._spend(search, advance)
            points = [search.point("saved", quantized, total_loss(assignment))]
        if settings.frontier:
            with self.plan.stage("measure the frontier") as advance:
                rivals = [self._uniform(search, mode) for mode in UNIFORM_MODES]
                sizes = [row["average_bits"] for row in rivals]
                points += search.points(sizes, advance) + rivals
        result = {"sensitivity": found, "assignment": assignment, "points": points}
        return quantized, result

    def _spend(
        self, search: Search, advance: Callable[[float], None]
    ) -> tuple[ResNetBKForCausalLM, Assignment]:
        if self.settings.target_bits is None:
            assert self.settings.max_increase is not None
            return search.smallest_within(self.settings.max_increase, advance)
        assignment = search.within(self.settings.target_bits)
        return search.quantize(assignment), assignment

    def _uniform(self, search: Search, mode: str) -> dict[str, Any]:
        model, _ = load_float(self.checkpoint)
        self._quantize(model, QuantizationConfig(mode, self.settings.config.group_size))
        return search.point(mode, model, None)

    def _quantize(self, model: ResNetBKForCausalLM, config: QuantizationConfig) -> None:
        model.configure_quantization(config)
        model.calibrate_quantization(self._calibration_batches())

    def _calibration_batches(self) -> tuple[Tensor, ...]:
        return spread(self.windows, self.calibration_windows).split(self.batch_size)

    def _judge(self) -> Judge:
        """Of as many windows as calibration took, and none of those."""
        held_out = spread(self.windows, self.calibration_windows, self.calibration_windows)
        bos_id: int = self.tokenizer.bos_token_id
        return Judge(held_out.flatten(), self.length, self.batch_size, bos_id)


def _windows(tokens: int, length: int) -> int:
    """How many windows of a length hold about so many tokens, at least one."""
    return max(1, tokens // length)


def as_json(result: dict[str, Any]) -> dict[str, Any]:
    """What `run_quantize` returns, ready for JSON."""
    sensitivity: list[Sensitivity] = result.get("sensitivity", [])
    assignment: Assignment = result.get("assignment", {})
    if not sensitivity:
        return result
    return result | {
        "sensitivity": [vars(entry) for entry in sensitivity],
        "assignment": {unit: vars(choice) for unit, choice in assignment.items()},
    }
