"""The steps of `bkcore quantize`, from a float checkpoint to a quantized one.

They calibrate on the training text, never on text that models are evaluated on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from bkcore.commands.files import say_what_is_replaced
from bkcore.commands.quantize_settings import QuantizeSettings, check_folders
from bkcore.display.console import warn
from bkcore.display.progress import Plan
from bkcore.errors import DataError, InputError, ReceiptError
from bkcore.evaluation.bit_budget import Search, calibrate_for_any_width, check_target
from bkcore.evaluation.calibration import CalibrationWindows, calibration_text
from bkcore.evaluation.checkpoints import load_float, save_checkpoint
from bkcore.evaluation.sensitivity import measure
from bkcore.model import ResNetBKForCausalLM
from bkcore.model.receipt import problems, problems_of_calibration, problems_of_size
from bkcore.quantization.budget import Assignment, total_loss
from bkcore.quantization.config import QuantizationConfig
from bkcore.text import TokenWindows
from bkcore.training import train
from bkcore.training.qat import train_through_codes

UNIFORM_MODES = ("ptq_int8", "ptq_int4", "mixed_precision")
"""Modes that the frontier of a bit budget is compared with."""


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
        output: another folder, to write.
        data: the text to calibrate on, as in `bkcore.text.load_split`. None takes the samples of
            the training text in the checkpoint, or the embedded corpus if the model was trained on
            that.
        settings: how to quantize.
        console: for the progress bar.
        control: folder for the float model trained on the text for as many steps as a QAT mode;
            None does not train it.

    Returns:
        `receipt`, see `bkcore.model.receipt.of_quantized`; `corpus`, the name of the text;
        `calibration_tokens`, how many of its tokens calibration saw; and `warning`, set if the
        model was trained on another text, else None.
        With a bit budget also `sensitivity`, a list of `Sensitivity`; `assignment`, the `Choice`
        of each unit; and `points`, rows of `Search.point`, with the saved model first.

    Raises:
        InputError: if the checkpoint is not float, two folders are the same, an output folder holds
            a float model, no model is within the budget, `control` is given in a mode that does not
            train, or `data` is None and the checkpoint does not provide enough text.
        CheckpointError: if the checkpoint cannot be loaded, or `output` cannot be written.
        DataError: if the text is missing, unreadable or too small.
        ReceiptError: if `settings.strict` finds something; nothing is written then.
    """
    check_folders(checkpoint, output, control, settings)
    say_what_is_replaced(console, (output, control))
    model, tokenizer = load_float(checkpoint)
    text = calibration_text(checkpoint, model, data, settings.needs_text)
    if text.warning is not None:
        warn(console, text.warning)
    found: dict[str, Any] = {}
    with Plan(_stages(settings, control), console) as plan:
        with plan.stage("read text"):
            windows = CalibrationWindows(
                TokenWindows(text.tokens(tokenizer), model.config.n_seq),
                settings.calibration_tokens,
                tokenizer.bos_token_id,
            )
        _check_before(model, windows, settings)
        if settings.has_budget:
            model, found = _within_budget(checkpoint, model, windows, settings, plan)
        else:
            with plan.stage("calibrate"):
                model.configure_quantization(settings.config)
                model.calibrate_quantization(windows.batches())
            if settings.steps is not None:
                _learn(checkpoint, model, windows, settings, plan)
        assert model.receipt is not None
        if settings.strict:
            _check_strictly(problems(model.receipt))
        save_checkpoint(output, model, tokenizer)
        if control is not None:
            other = _train_control(checkpoint, windows, settings, plan)
            save_checkpoint(control, other, tokenizer)
    return {
        "receipt": model.receipt,
        "corpus": text.name,
        "calibration_tokens": sum(batch.numel() for batch in windows.batches()),
        "warning": text.warning,
        **found,
    }


def _check_strictly(found: Sequence[str]) -> None:
    """Raise `ReceiptError` with all problems found, if there are any."""
    if found:
        raise ReceiptError("--strict: " + "; ".join(found))


def _stages(settings: QuantizeSettings, control: Path | None) -> dict[str, float]:
    """The stages, with about how long each takes."""
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


def _check_before(
    model: ResNetBKForCausalLM, windows: CalibrationWindows, settings: QuantizeSettings
) -> None:
    """Raise errors before the work that would otherwise come after it."""
    length, batch_size = windows.length, windows.batch_size
    if settings.steps is not None and len(windows.all) < batch_size:
        raise DataError(
            f"the training text has only {len(windows.all)} windows of {length} tokens, but a "
            f"training step takes {batch_size}; give more text"
        )
    if settings.target_bits is not None:
        check_target(model, settings.target_bits, settings.config.group_size)
    if settings.has_budget and len(windows.scorer().tokens) < 2 * length:
        raise InputError(
            f"a bit budget is measured on as many windows as calibration takes, but that is one of "
            f"{length} tokens, which tells nothing about the spread; allow more "
            "--calibration-tokens, or give more text"
        )
    if settings.strict and not settings.has_budget:
        _check_strictly(problems_of_size(model, settings.config))


def _check_calibration(model: ResNetBKForCausalLM) -> None:
    """Raise `ReceiptError` if calibration did not reach something."""
    if model.receipt is not None:
        _check_strictly(problems_of_calibration(model.receipt["calibration"]))


def _learn(
    checkpoint: Path,
    model: ResNetBKForCausalLM,
    windows: CalibrationWindows,
    settings: QuantizeSettings,
    plan: Plan,
) -> None:
    """Train a calibrated model in its QAT mode, and convert it."""
    if settings.strict:
        _check_calibration(model)
    schedule = settings.schedule(windows.length)
    teacher = None if settings.distill is False else load_float(checkpoint)[0]
    with plan.stage("train") as advance:
        train_through_codes(
            model,
            windows.all,
            schedule,
            teacher,
            on_step=lambda step: advance(step / schedule.steps),
        )


def _train_control(
    checkpoint: Path, windows: CalibrationWindows, settings: QuantizeSettings, plan: Plan
) -> ResNetBKForCausalLM:
    """Train the float model on the text for as many steps as the QAT mode."""
    model, _ = load_float(checkpoint)
    schedule, origin = settings.schedule(windows.length), model.config.training_text
    with plan.stage("train the control") as advance:
        train(
            model,
            windows.all,
            schedule,
            on_step=lambda step: advance(step / schedule.steps),
        )
    model.config.training_text = origin  # a few more steps do not change where it comes from
    return model


def _within_budget(
    checkpoint: Path,
    model: ResNetBKForCausalLM,
    windows: CalibrationWindows,
    settings: QuantizeSettings,
    plan: Plan,
) -> tuple[ResNetBKForCausalLM, dict[str, Any]]:
    """The model with bits within the budget, and the results of the search."""
    with plan.stage("calibrate"):
        calibrate_for_any_width(model, settings.config, windows.batches())
        if settings.strict:
            _check_calibration(model)
    with plan.stage("measure sensitivity") as advance:
        batches = windows.for_sensitivity()
        found = measure(model, settings.config, batches, on_progress=advance)
    with plan.stage("spend the budget") as advance:
        search = Search(model, found, windows.scorer())
        quantized, assignment = _spend(search, settings, advance)
        points = [search.point("saved", quantized, total_loss(assignment))]
    if settings.frontier:
        with plan.stage("measure the frontier") as advance:
            rivals = [
                _uniform(checkpoint, mode, windows, settings, search) for mode in UNIFORM_MODES
            ]
            points += search.points([row["average_bits"] for row in rivals], advance) + rivals
    return quantized, {"sensitivity": found, "assignment": assignment, "points": points}


def _spend(
    search: Search, settings: QuantizeSettings, advance: Callable[[float], None]
) -> tuple[ResNetBKForCausalLM, Assignment]:
    if settings.target_bits is None:
        assert settings.max_increase is not None
        return search.smallest_within(settings.max_increase, advance)
    assignment = search.within(settings.target_bits)
    return search.quantize(assignment), assignment


def _uniform(
    checkpoint: Path,
    mode: str,
    windows: CalibrationWindows,
    settings: QuantizeSettings,
    search: Search,
) -> dict[str, Any]:
    """The row of the same checkpoint in a uniform mode, which gives all weights of a part equal
    bits."""
    model, _ = load_float(checkpoint)
    model.configure_quantization(QuantizationConfig(mode, settings.config.group_size))
    model.calibrate_quantization(windows.batches())
    return search.point(mode, model, None)
