"""What training does to the process that calls it."""

from collections.abc import Iterator

import pytest
import torch
from transformers.utils import logging

from bkcore.model import LanguageModel
from bkcore.text import TokenWindows
from bkcore.training import Schedule, train


@pytest.fixture(params=[logging.ERROR, logging.WARNING, logging.INFO])
def level(request: pytest.FixtureRequest) -> Iterator[int]:
    before = logging.get_verbosity()
    logging.set_verbosity(request.param)
    yield request.param
    logging.set_verbosity(before)


def test_the_callers_level_of_logging_stays(level: int) -> None:
    seen: list[int] = []
    train(
        LanguageModel(50, 16, 1, 16, num_experts=2, expert_size=16),
        TokenWindows(torch.arange(480) % 50, 16),
        Schedule(steps=1, batch_size=4, learning_rate=5e-3),
        on_step=lambda step: seen.append(logging.get_verbosity()),
    )
    assert [*seen, logging.get_verbosity()] == [level, level]
