"""Training a quantized model through its codes (QAT), the same way for every command."""

from __future__ import annotations

from collections.abc import Callable

from bkcore.model import ResNetBKForCausalLM
from bkcore.text import TokenWindows, spread
from bkcore.training.schedule import Schedule
from bkcore.training.trainer import train

_READINGS = 10
"""How often each window is learned from a teacher, who is asked only the first time."""


def train_through_codes(
    model: ResNetBKForCausalLM,
    windows: TokenWindows,
    schedule: Schedule,
    teacher: ResNetBKForCausalLM | None,
    *,
    seed: int = 0,
    on_step: Callable[[int], None] | None = None,
) -> None:
    """Train a calibrated model in its QAT mode, convert it, and record the training in its receipt.

    Args:
        model: calibrated in a QAT mode.
        windows: of the training text.
        schedule: how long and how fast to train.
        teacher: the float model, whose next-token distributions are learned on a few windows, used
            repeatedly. None learns the text itself, on all windows.
        seed, on_step: as in `bkcore.training.train`.

    Raises:
        As `bkcore.training.train` does.
    """
    origin = model.config.training_text
    length = windows[0]["input_ids"].numel()
    if teacher is not None:
        few = max(schedule.batch_size, schedule.steps * schedule.batch_size // _READINGS)
        windows = TokenWindows(spread(windows, few).flatten(), length)
    log = train(model, windows, schedule, seed=seed, teacher=teacher, on_step=on_step)
    model.config.training_text = origin  # a few more steps do not change where it comes from
    model.convert()
    assert model.receipt is not None
    model.receipt["training"] = {
        "steps": schedule.steps,
        "windows": len(windows),
        "batch_size": schedule.batch_size,
        "window": length,
        "learning_rate": schedule.learning_rate,
        "distilled": teacher is not None,
        "first_loss": log[0]["loss"],
        "last_loss": log[-1]["loss"],
    }
