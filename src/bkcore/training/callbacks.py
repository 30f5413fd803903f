"""Trainer callbacks at each step and log entry: the time limit, and the caller's functions."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from accelerate.utils import broadcast
from transformers import (
    EarlyStoppingCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_utils import IntervalStrategy

from bkcore.training.schedule import Schedule


class Clock:
    """Counts the minutes of training, including those before an interruption."""

    def __init__(self, before: float) -> None:
        self._before = before
        self._start = time.monotonic()

    @property
    def minutes(self) -> float:
        """Minutes so far."""
        return self._before + (time.monotonic() - self._start) / 60


class _TimeLimit(TrainerCallback):
    def __init__(self, clock: Clock, max_minutes: float) -> None:
        self.clock = clock
        self.max_minutes = max_minutes

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # All processes must stop at the same step, or they would wait for each other forever.
        over = torch.tensor(int(self.clock.minutes >= self.max_minutes))
        if int(broadcast(over)):
            control.should_training_stop = control.should_save = True
            control.should_evaluate = args.eval_strategy != IntervalStrategy.NO


class _OnStep(TrainerCallback):
    def __init__(self, on_step: Callable[[int], None]) -> None:
        self.on_step = on_step

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.on_step(state.global_step)


class _OnLog(TrainerCallback):
    def __init__(self, on_entry: Callable[[dict[str, float]], None]) -> None:
        self.on_entry = on_entry

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        for entry in curve(state.log_history[-1:]):
            self.on_entry(entry)


def callbacks(
    schedule: Schedule,
    clock: Clock,
    on_step: Callable[[int], None] | None,
    on_log: Callable[[dict[str, float]], None] | None,
) -> list[TrainerCallback]:
    """The callbacks of the Trainer for this schedule."""
    found: list[TrainerCallback] = []
    if schedule.patience is not None:
        found.append(EarlyStoppingCallback(schedule.patience))
    if schedule.max_minutes is not None:
        found.append(_TimeLimit(clock, schedule.max_minutes))
    if on_step is not None:
        found.append(_OnStep(on_step))
    if on_log is not None:
        found.append(_OnLog(on_log))
    return found


def curve(log_history: list[dict[str, float]]) -> list[dict[str, float]]:
    """The entries of the Trainer's log that make up the curve, without its `epoch`."""
    return [
        {name: value for name, value in entry.items() if name != "epoch"}
        for entry in log_history
        if "loss" in entry or "eval_loss" in entry
    ]
