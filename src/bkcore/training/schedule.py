"""The schedule of a training: its length, learning rate and intervals."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from bkcore.arguments import did_you_mean
from bkcore.errors import InputError
from bkcore.quantization.config import QAT_LEARNING_RATE
from bkcore.reading import shown

OPTIMIZERS = ("adamw", "muon")
SCHEDULERS = ("cosine", "linear", "warmup_stable_decay", "constant_with_warmup")

# Fields that may change between an interrupted run and its continuation, as they affect no weight.
_WITHOUT_EFFECT_ON_WEIGHTS = ("log_every", "save_every", "max_minutes")


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to train.

    Attributes:
        steps: optimizer steps, at least 1.
        batch_size: windows per step, over all processes and accumulated parts together.
        learning_rate: peak rate, positive, after a linear warm-up.
        warmup_fraction: fraction of the steps spent warming up, 0 to 1.
        optimizer: "adamw"; or "muon" for the matrices between hidden features with AdamW for the
            rest, see `bkcore.training.optimizer`.
        weight_decay: decay of matrices; vectors and learned scales have none.
        scheduler: how the rate falls after the warm-up, by transformers' names: "cosine" and
            "linear" to zero at the last step, "constant_with_warmup" not at all,
            "warmup_stable_decay" along a cosine to zero over the last `decay_fraction` only.
        decay_fraction: see above, 0 to 1; together with `warmup_fraction` at most 1.
        gradient_accumulation: parts in which a batch is computed, one after the other, to save
            memory. All parts weigh the same, however many labels of -100 they hold.
        log_every, save_every, evaluate_every: steps between log entries, resume checkpoints and
            evaluations; None means a twentieth of the steps.
        patience: stop after this many evaluations in a row without a new best; None never stops.
        max_minutes: stop after this much training time, including earlier parts of a resumed run;
            None never stops. The learning rate does not take it into account, so choose `steps` to
            fit, and use this as a hard limit.

    Raises:
        InputError: if a value is not as above.
    """

    steps: int
    batch_size: int
    learning_rate: float
    warmup_fraction: float = 0.05
    optimizer: str = "adamw"
    weight_decay: float = 0.1
    scheduler: str = "cosine"
    decay_fraction: float = 0.2
    gradient_accumulation: int = 1
    log_every: int | None = None
    save_every: int | None = None
    evaluate_every: int | None = None
    patience: int | None = None
    max_minutes: float | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "gradient_accumulation"):
            _check_count(name, getattr(self, name))
        for name in ("log_every", "save_every", "evaluate_every", "patience"):
            if getattr(self, name) is not None:
                _check_count(name, getattr(self, name))
        for name in ("warmup_fraction", "decay_fraction"):
            _check_range(name, getattr(self, name), 0, 1)
        _check_range("weight_decay", self.weight_decay, 0)
        _check_positive("learning_rate", self.learning_rate)
        if self.max_minutes is not None:
            _check_positive("max_minutes", self.max_minutes)
        for name, known in (("optimizer", OPTIMIZERS), ("scheduler", SCHEDULERS)):
            value = getattr(self, name)
            if value not in known:
                raise InputError(
                    f"{name} is {shown(value)}, but must be one of {known}"
                    f"{did_you_mean(value, known)}"
                )
        if (
            self.scheduler == "warmup_stable_decay"
            and self.warmup_fraction + self.decay_fraction > 1
        ):
            raise InputError(
                f"warmup_fraction {self.warmup_fraction} and decay_fraction {self.decay_fraction} "
                "together must be at most 1"
            )
        if self.batch_size % self.gradient_accumulation:
            raise InputError(
                f"batch_size {self.batch_size} does not divide into {self.gradient_accumulation} "
                "equal parts; change batch_size or gradient_accumulation"
            )

    @property
    def warmup_steps(self) -> int:
        """Steps of the linear warm-up."""
        return round(self.warmup_fraction * self.steps)

    def interval(self, name: str) -> int:
        """Steps of `log_every`, `save_every` or `evaluate_every`, with the default filled in."""
        value: int | None = getattr(self, name)
        return max(1, self.steps // 20) if value is None else value

    def fixed(self) -> dict[str, Any]:
        """The fields that a continued run must share with the interrupted one."""
        return {
            name: value
            for name, value in vars(self).items()
            if name not in _WITHOUT_EFFECT_ON_WEIGHTS
        }


def schedule_for_codes(
    steps: int, batch_size: int, learning_rate: float = QAT_LEARNING_RATE
) -> Schedule:
    """The schedule of a training through codes."""
    return Schedule(
        steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        warmup_fraction=0.1,
        weight_decay=0.0,
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check_count(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InputError(f"{name} must be a positive integer, not {shown(value)}")


def _check_positive(name: str, value: Any) -> None:
    if not _is_number(value) or not 0 < value < float("inf"):
        raise InputError(f"{name} must be a positive number, not {shown(value)}")


def _check_range(name: str, value: Any, low: float, high: float = float("inf")) -> None:
    if not _is_number(value) or not low <= value <= high:
        limits = f"at least {low}" if high == float("inf") else f"between {low} and {high}"
        raise InputError(f"{name} must be a number {limits}, not {shown(value)}")
