"""How `bkcore quantize` quantizes: its options together, checked before anything happens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bkcore.errors import InputError
from bkcore.quantization.config import (
    CALIBRATION_TOKENS,
    QAT_LEARNING_RATE,
    QuantizationConfig,
)

if TYPE_CHECKING:
    from bkcore.training import Schedule


@dataclass(frozen=True)
class QuantizeSettings:
    """How a checkpoint is quantized.

    Attributes:
        mode: as in `QuantizationConfig`.
        group_size: inputs of an INT4 weight that share a scale, as in `QuantizationConfig`; None is
            its default. The INT8 modes have a scale per row and take none.
        min_size: weights with fewer numbers stay in float16, as in `QuantizationConfig`; None is
            its default. QAT and a bit budget decide for themselves and take none.
        calibration_tokens: tokens of the training text to calibrate on, in windows of the length
            of the model's training; at least one window is taken.
        steps: of training, which the QAT modes need and the others do not have.
        learning_rate: the peak of that training; None is `QAT_LEARNING_RATE`.
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
        more = self.calibration_tokens > CALIBRATION_TOKENS
        return more or self.has_budget or self.steps is not None

    def schedule(self, window: int) -> Schedule:
        """Length and speed of the training in a QAT mode, with windows of so many tokens."""
        from bkcore.evaluation.judging import batch_of
        from bkcore.training.codes import schedule_for_codes

        assert self.steps is not None
        rate = QAT_LEARNING_RATE if self.learning_rate is None else self.learning_rate
        return schedule_for_codes(self.steps, batch_of(window), rate)
