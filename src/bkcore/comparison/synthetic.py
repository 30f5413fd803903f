"""The synthetic tasks: small versions of the same models, and their accuracy by distance."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from bkcore.comparison import contestants
from bkcore.comparison.contestants import (
    Contestant,
    Frame,
    active_parameters,
    open_size,
    total_parameters,
)
from bkcore.comparison.runs import Advance, Run, StepTimes
from bkcore.comparison.selective_scan import fast_selective_scan
from bkcore.comparison.settings import SyntheticSettings
from bkcore.comparison.tasks import TASKS, Examples, ExampleWindows, Task
from bkcore.training import Schedule, train

GROUP = "synthetic"

CONTESTANTS: tuple[Contestant, ...] = (
    contestants.RESNET_BK,
    contestants.CONVOLUTION,
    contestants.MAMBA,
    contestants.GPT2,
)

BUCKETS = ((7, 16), (16, 32), (32, 64), (64, 128))
"""Ranges of distances: from the first number up to, but not including, the second."""

_TEST_SEED = 1 << 40
"""Added to the seed of the training sequences, so that the test sequences differ."""


def runs(settings: SyntheticSettings, seeds: Sequence[int] = (0,)) -> list[Run]:
    """All runs: each task with each contestant."""
    return [
        Run(
            name=f"{GROUP}/{task.name}-{contestant.name}/seed{seed}",
            settings=partial(_settings_of, task, contestant, settings, seed),
            execute=partial(_execute, task, contestant, settings, seed),
            weight=0.2 * settings.steps,
        )
        for task in TASKS
        for contestant in CONTESTANTS
        for seed in seeds
    ]


def _settings_of(
    task: Task, contestant: Contestant, settings: SyntheticSettings, seed: int
) -> dict[str, Any]:
    size = open_size(contestant, frame(task, settings), settings.parameters)
    return {**asdict(settings), "task": task.name, "open_size": size, "seed": seed}


def frame(task: Task, settings: SyntheticSettings) -> Frame:
    """The sizes that the models for a task share."""
    # Two layers: with more, convolutions alone would reach the nearest answers.
    return Frame(task.vocab_size, task.length, settings.width, settings.layers, settings.layers)


def _execute(
    task: Task,
    contestant: Contestant,
    settings: SyntheticSettings,
    seed: int,
    folder: Path,
    advance: Advance,
) -> dict[str, Any]:
    schedule = Schedule(settings.steps, settings.batch_size, settings.learning_rate)
    generator = torch.Generator().manual_seed(seed)
    examples = task.draw(schedule.steps * schedule.batch_size, generator)
    test = task.draw(settings.test_sequences, generator.manual_seed(_TEST_SEED + seed))
    size = open_size(contestant, frame(task, settings), settings.parameters)
    torch.manual_seed(seed)
    model = contestant.build(frame(task, settings), size)
    times = StepTimes(folder / "steps.txt")

    def on_step(step: int) -> None:
        times(step)
        advance(step / schedule.steps)

    with fast_selective_scan():
        log = train(
            model,
            ExampleWindows(examples),
            schedule,
            seed=seed,
            output=folder,
            on_step=on_step,
        )
        right = correct(model, test, settings.batch_size)
    row = {
        "task": task.name,
        "contestant": contestant.name,
        "seed": seed,
        "chance": task.chance,
        "accuracy": float(right.double().mean()),
        "answers": len(right),
        "accuracy_by_distance": by_distance(right, test.distance[test.distance > 0]),
        "active_parameters": active_parameters(model),
        "total_parameters": total_parameters(model),
        "open_size": {contestant.size_name: size},
        "schedule": asdict(schedule),
        **times.seconds(),
        "threads": torch.get_num_threads(),
        "log": log,
    }
    return {"row": row, "protocol": {"settings": asdict(settings)}}


@torch.inference_mode()
def correct(model: PreTrainedModel, examples: Examples, batch_size: int) -> Tensor:
    """Whether the likeliest token is the answer to each question: bool (questions,)."""
    model.eval()
    found = []
    for ids, labels in _batches(examples, batch_size):
        rows, positions = (labels != -100).nonzero(as_tuple=True)
        logits = model(input_ids=ids).logits[rows, positions - 1]
        found.append(logits.argmax(-1) == labels[rows, positions])
    return torch.cat(found)


def _batches(examples: Examples, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    pieces = (examples.input_ids.split(batch_size), examples.labels.split(batch_size))
    return zip(*pieces, strict=True)


def by_distance(right: Tensor, distance: Tensor) -> list[dict[str, Any]]:
    """Accuracy in each range of distances that has answers.

    Args:
        right: bool (questions,).
        distance: int64 (questions,).
    """
    rows = []
    for low, high in BUCKETS:
        chosen = right[(low <= distance) & (distance < high)]
        if len(chosen):
            accuracy = float(chosen.double().mean())
            rows.append({"from": low, "to": high, "answers": len(chosen), "accuracy": accuracy})
    return rows
