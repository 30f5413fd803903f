"""Training with transformers' `Trainer`."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.utils.data import Dataset
from transformers import (
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_callback import PrinterCallback


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to train.

    Attributes:
        steps: optimizer steps.
        batch_size: windows a step.
        learning_rate: peak rate, after a linear warm-up, before a cosine decay to zero.
        warmup_fraction: part of the steps that warms up.
        weight_decay: AdamW decay of matrices; vectors and learned scales have none.
    """

    steps: int
    batch_size: int
    learning_rate: float
    warmup_fraction: float = 0.05
    weight_decay: float = 0.1


class _MatrixDecayTrainer(Trainer):
    """Decay matrices only: energies, hoppings, norms and step sizes have natural scales."""

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        return [
            name
            for name, parameter in model.named_parameters()
            if parameter.dim() >= 2 and not name.endswith("log_scales")
        ]


class _OnStep(TrainerCallback):
    def __init__(self, on_step: Callable[[int], None]) -> None:
        self.on_step = on_step

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.on_step(state.global_step)


def train(
    model: PreTrainedModel,
    dataset: Dataset[Any],
    schedule: Schedule,
    *,
    seed: int = 0,
    on_step: Callable[[int], None] | None = None,
) -> list[dict[str, float]]:
    """Train a model on windows of tokens, in place, on the CPU.

    Args:
        model: a transformers model whose forward takes `input_ids` and `labels`.
        dataset: items with `input_ids` and `labels`; shuffled, repeated for as long as needed.
        schedule: length and speed.
        seed: order of the windows.
        on_step: called with the number of steps done.

    Returns:
        The trainer's log: dictionaries with `step`, `loss` (mean since the last entry, nats per
        token, load balancing included) and `learning_rate`; about twenty entries.
    """
    with tempfile.TemporaryDirectory() as unused_output:
        arguments = TrainingArguments(
            output_dir=unused_output,
            use_cpu=True,
            max_steps=schedule.steps,
            per_device_train_batch_size=schedule.batch_size,
            learning_rate=schedule.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=round(schedule.warmup_fraction * schedule.steps),
            weight_decay=schedule.weight_decay,
            adam_beta2=0.98,
            max_grad_norm=1.0,
            optim="adamw_torch_fused",
            seed=seed,
            data_seed=seed,
            dataloader_drop_last=True,
            logging_steps=max(1, schedule.steps // 20),
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            log_level="error",
        )
        callbacks: list[TrainerCallback] = [_OnStep(on_step)] if on_step else []
        trainer = _MatrixDecayTrainer(
            model=model, args=arguments, train_dataset=dataset, callbacks=callbacks
        )
        trainer.pop_callback(PrinterCallback)
        trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry]
