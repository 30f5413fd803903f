"""The options of `bkcore quantize`, checked together before anything happens."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bkcore.commands.files import prepare_model
from bkcore.errors import InputError
from bkcore.quantization.config import (
    CALIBRATION_TOKENS,
    QAT_LEARNING_RATE,
    QuantizationConfig,
)
from bkcore.training.schedule import Schedule, schedule_for_codes


@dataclass(frozen=True)
class QuantizeSettings:
    """How a checkpoint is quantized.

    Attributes:
        mode: as in `QuantizationConfig`.
        group_size: inputs of an INT4 weight that share a scale, as in `QuantizationConfig`; None
            takes its default. Not for the INT8 modes, which have one scale per row.
        min_size: weights with fewer numbers stay in float16, as in `QuantizationConfig`; None
            takes its default. Not for QAT or a bit budget, which quantize weights of any size.
        calibration_tokens: tokens of the training text to calibrate on, in windows as long as in
            the model's training; at least one window is taken.
        steps: training steps, required in the QAT modes and not allowed in others.
        learning_rate: peak learning rate of that training; None means `QAT_LEARNING_RATE`.
        distill: whether that training learns the next-token distributions of the float checkpoint
            (True, or None in a QAT mode) or the tokens of the text (False).
        strict: refuse a model in which any tensor differs from what its mode promises.
        target_bits: upper limit on the average bits per weight, including scales, over all weights
            that modes quantize (projections, experts, embedding).
        max_increase: upper limit, in percent, on the rise of perplexity on held-out training text
            (the upper end of its 95 % interval); the smallest such model is taken.
        frontier: also measure models of all sizes, and the uniform modes.

    Raises:
        InputError: for an unknown mode or group size, a QAT mode without steps, a training option
            without a QAT mode, an increase or a rate that is not positive, a min_size where it has
            no effect, or a bit budget in a mode other than mixed precision.
    """

    mode: str = QuantizationConfig.PTQ_INT8
    group_size: int | None = None
    min_size: int | None = None
    calibration_tokens: int = CALIBRATION_TOKENS
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
                f"mode {self.mode!r} trains, and needs --steps; a tenth of the steps of the float "
                "training is plenty"
            )
        of_training = {
            "--steps": self.steps,
            "--learning-rate": self.learning_rate,
            "--distill and no --no-distill": self.distill,
        }
        for option, value in of_training.items():
            if not self.config.is_qat and value is not None:
                raise InputError(f"mode {self.mode!r} does not train and takes no {option}")
        if self.steps is not None:
            self._schedule(1)  # refuses an impossible learning rate
        if self.group_size is not None and self.mode.endswith("int8"):
            raise InputError(
                f"mode {self.mode!r} has one scale per row of a weight and takes no --group-size"
            )
        if self.min_size is not None and (self.config.is_qat or self.has_budget):
            raise InputError(
                "QAT modes and bit budgets quantize weights of any size and take no --min-size"
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
                f"a bit budget mixes precisions and needs mode 'mixed_precision', whose core is "
                f"INT8, not {self.mode!r}"
            )

    @property
    def config(self) -> QuantizationConfig:
        """The configuration for the model."""
        given: dict[str, Any] = {"group_size": self.group_size, "min_size": self.min_size}
        chosen = {name: value for name, value in given.items() if value is not None}
        return QuantizationConfig(self.mode, **chosen)

    @property
    def has_budget(self) -> bool:
        """Whether each weight gets bits of its own."""
        return self.target_bits is not None or self.max_increase is not None

    @property
    def needs_text(self) -> bool:
        """Whether more text is needed than calibration takes by default."""
        more = self.calibration_tokens > CALIBRATION_TOKENS
        return more or self.has_budget or self.steps is not None

    def schedule(self, window: int) -> Schedule:
        """The training schedule of a QAT mode, for windows of this many tokens."""
        from bkcore.evaluation.evaluate import batch_of

        return self._schedule(batch_of(window))

    def _schedule(self, batch_size: int) -> Schedule:
        assert self.steps is not None
        rate = QAT_LEARNING_RATE if self.learning_rate is None else self.learning_rate
        return schedule_for_codes(self.steps, batch_size, rate)


def check_folders(
    checkpoint: Path, output: Path, control: Path | None, settings: QuantizeSettings
) -> None:
    """Test whether the models can be saved, each in a folder of its own.

    Args:
        checkpoint: the folder that is read.
        output: for the quantized model.
        control: for the float model trained beside a QAT mode; None if there is none.
        settings: how the checkpoint is quantized.

    Raises:
        InputError: if they cannot, or there is a control though nothing is trained.
    """
    if control is not None and settings.steps is None:
        raise InputError(f"mode {settings.mode!r} does not train and takes no --control")
    if control is not None and control.resolve() in (checkpoint.resolve(), output.resolve()):
        raise InputError(f"the control needs a folder of its own, not {control}")
    for folder in (output, control):
        if folder is not None:
            prepare_model(folder, checkpoint)
