"""Schedules: what is refused, and what a resumed run may change."""

from typing import Any

import pytest

from bkcore.errors import InputError
from bkcore.training import Schedule

GOOD: dict[str, Any] = {"steps": 100, "batch_size": 8, "learning_rate": 1e-3}


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"steps": 0}, "steps must be a positive integer, not 0"),
        ({"batch_size": 2.5}, "batch_size must be a positive integer, not 2.5"),
        ({"learning_rate": "5e-3"}, "learning_rate must be a positive number, not '5e-3'"),
        ({"learning_rate": float("nan")}, "learning_rate must be a positive number"),
        ({"warmup_fraction": 1.5}, "warmup_fraction must be a number between 0 and 1"),
        ({"weight_decay": -1}, "weight_decay must be a number at least 0"),
        ({"patience": 0}, "patience must be a positive integer"),
        ({"save_every": True}, "save_every must be a positive integer"),
        ({"max_minutes": 0}, "max_minutes must be a positive number"),
        ({"scheduler": "cosin"}, "scheduler is 'cosin', but must be one of"),
        ({"optimizer": "adam"}, "optimizer is 'adam', but must be one of"),
        ({"gradient_accumulation": 3}, "batch_size 8 does not divide into 3"),
        (
            {"scheduler": "warmup_stable_decay", "warmup_fraction": 0.5, "decay_fraction": 0.6},
            "together must be at most 1",
        ),
    ],
)
def test_impossible_values_are_named(change: dict[str, Any], complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        Schedule(**{**GOOD, **change})


def test_intervals_default_to_a_twentieth() -> None:
    assert Schedule(**GOOD).interval("save_every") == 5
    assert Schedule(**{**GOOD, "steps": 7}).interval("log_every") == 1
    assert Schedule(**GOOD, evaluate_every=33).interval("evaluate_every") == 33


def test_only_what_moves_no_weight_may_change_between_parts_of_a_run() -> None:
    first = Schedule(**GOOD, save_every=3, log_every=4, max_minutes=5)
    assert first.fixed() == Schedule(**GOOD).fixed()
    for name, value in {"steps": 99, "optimizer": "muon", "patience": 3}.items():
        assert Schedule(**{**GOOD, name: value}).fixed() != first.fixed()
