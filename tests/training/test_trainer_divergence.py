"""A training that runs away is stopped, and leaves no checkpoint of it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from bkcore.errors import DivergenceError, InputError
from bkcore.model import LanguageModel, ResNetBKForCausalLM
from bkcore.text import TokenWindows
from bkcore.training import Schedule, train

WINDOWS = TokenWindows(torch.arange(480) % 50, 16)


def small() -> ResNetBKForCausalLM:
    torch.manual_seed(0)
    return LanguageModel(50, 16, 1, 16, num_experts=2, expert_size=16)


def schedule(**options: Any) -> Schedule:
    return Schedule(
        **{"steps": 8, "batch_size": 4, "learning_rate": 5e-3, "save_every": 1} | options
    )


def test_a_rate_that_is_too_high_is_named_and_no_ruin_is_saved(tmp_path: Path) -> None:
    with pytest.raises(DivergenceError, match=r"diverged after \d steps: .* a peak of 1e\+30"):
        train(small(), WINDOWS, schedule(learning_rate=1e30), output=tmp_path)
    for checkpoint in tmp_path.glob("checkpoint-*/model.safetensors"):
        assert all(bool(torch.isfinite(x).all()) for x in load_file(checkpoint).values())


def test_a_model_that_refuses_to_compute_has_diverged() -> None:
    model = small()

    def ruin(step: int) -> None:
        if step == 2:
            with torch.no_grad():
                model.get_parameter("layers.0.mixer.log_eta").fill_(-1e4)

    with pytest.raises(DivergenceError, match="after 2 steps: eta must be > 0"):
        train(model, WINDOWS, schedule(), on_step=ruin)


def test_what_is_wrong_from_the_beginning_is_no_divergence() -> None:
    with pytest.raises(InputError, match=r"must be in \[0, 50\)"):
        train(small(), TokenWindows(torch.arange(480), 16), schedule())


def test_data_that_are_wrong_later_on_are_no_divergence() -> None:
    class Late(TokenWindows):
        reads = 0

        def __getitem__(self, index: int) -> dict[str, Tensor]:
            Late.reads += 1
            item = super().__getitem__(index)
            return item if Late.reads < 12 else {**item, "input_ids": item["input_ids"] + 50}

    with pytest.raises(InputError, match=r"must be in \[0, 50\)"):
        train(small(), Late(torch.arange(480) % 50, 16), schedule())


def test_a_teacher_without_numbers_is_noticed() -> None:
    teacher = small()
    with torch.no_grad():
        teacher.get_parameter("embedding.weight").fill_(float("nan"))
    with pytest.raises(InputError, match="the teacher's logits are not finite"):
        train(small(), WINDOWS, schedule(), teacher=teacher)


@pytest.mark.parametrize("save", [True, False])
def test_the_last_step_counts_too(tmp_path: Path, save: bool) -> None:
    def ruin(grad: Tensor) -> Tensor:
        return torch.full_like(grad, float("inf"))

    model = small()
    weight: nn.Parameter = model.final_norm.weight
    weight.register_hook(ruin)
    with pytest.raises(DivergenceError, match=r"after 1 steps: .* is not finite"):
        train(model, WINDOWS, schedule(steps=1), output=tmp_path if save else None)
    assert list(tmp_path.iterdir()) == []
