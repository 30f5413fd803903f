"""Contestants are of one size, and their active parameters are counted as they are used."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bkcore.comparison import language, synthetic
from bkcore.comparison.contestants import (
    CONVOLUTION,
    GPT2,
    GREEN,
    LLAMA,
    MAMBA,
    RESNET_BK,
    Contestant,
    Frame,
    active_parameters,
    open_size,
    total_parameters,
)
from bkcore.comparison.language import LanguageComparison
from bkcore.comparison.settings import LanguageSettings, SyntheticSettings
from bkcore.comparison.tasks import TASKS
from bkcore.errors import InputError
from bkcore.model import LanguageModel
from bkcore.text import Corpus

LANGUAGE = LanguageComparison(Corpus("none", "", ""), LanguageSettings())
SMALL = SyntheticSettings()


@pytest.mark.parametrize(
    ("frame", "parameters", "names"),
    [
        (LANGUAGE.frame, LANGUAGE.settings.parameters, list(language.CONTESTANTS)),
        *((synthetic.frame(t, SMALL), SMALL.parameters, synthetic.CONTESTANTS) for t in TASKS),
    ],
)
def test_active_parameters_agree_within_three_percent(
    frame: Frame, parameters: int, names: list[Contestant]
) -> None:
    found = {}
    for contestant in names:
        model = contestant.build(frame, open_size(contestant, frame, parameters))
        found[contestant.name] = active_parameters(model)
    assert max(found.values()) <= 1.03 * min(found.values()), found


@pytest.mark.parametrize("contestant", [RESNET_BK, CONVOLUTION, GREEN, GPT2, LLAMA, MAMBA])
def test_logits_do_not_see_what_follows(contestant: Contestant) -> None:
    torch.manual_seed(0)
    model = contestant.build(Frame(50, 16, 64, 2, 2), 64).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)  # some start at zero, and would hide a leak
    ids = torch.randint(50, (1, 16))
    changed = ids.clone()
    changed[0, 10] = (ids[0, 10] + 1) % 50
    with torch.no_grad():
        before, after = model(input_ids=ids).logits, model(input_ids=changed).logits
    torch.testing.assert_close(before[0, :10], after[0, :10])
    assert not torch.allclose(before[0, 10], after[0, 10])


@pytest.mark.parametrize("contestant", [RESNET_BK, CONVOLUTION, GPT2, LLAMA, MAMBA])
def test_embeddings_are_tied(contestant: Contestant) -> None:
    frames = [Frame(vocabulary, 16, 64, 2, 2) for vocabulary in (50, 51)]
    totals = [total_parameters(contestant.build(frame, 64)) for frame in frames]
    assert totals[1] - totals[0] == 64


@pytest.mark.parametrize("contestant", [GPT2, LLAMA])
def test_attention_is_the_fused_one(contestant: Contestant) -> None:
    config = contestant.build(Frame(50, 16, 64, 2, 2), 64).config
    assert config._attn_implementation == "sdpa"


def test_idle_experts_are_not_active() -> None:
    model = LanguageModel(50, 16, 2, 16, num_experts=5, experts_per_token=2, expert_size=7)
    idle = 2 * 3 * (2 * 16 * 7)  # layers, experts, matrices of an expert
    assert active_parameters(model) == total_parameters(model) - idle


def test_a_size_that_cannot_be_met_is_refused() -> None:
    with pytest.raises(InputError, match=r"gpt2 cannot have 10,000 active parameters.*with 1 "):
        open_size(GPT2, Frame(50, 16, 64, 2, 2), 10_000)
