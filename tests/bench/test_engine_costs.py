"""What a pass costs, against counts by hand."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig

from bkcore.bench.engine_costs import (
    Cost,
    Pass,
    active_parameters,
    llama_cost,
    own_cost,
    plain_read,
    state_bytes,
)
from bkcore.bench.random_models import MODES, quantized, random_model
from bkcore.model import ResNetBKForCausalLM

OPTIONS = {
    "vocab_size": 50,
    "d_model": 16,
    "n_layers": 2,
    "num_heads": 2,
    "key_size": 4,
    "num_experts": 4,
    "experts_per_token": 1,
    "expert_size": 24,
}
EXPERT = 2 * 16 * 24
IN, OUT, TAPS = 16 * (16 + 2 * 8 + 16 + 2 * 2), 16 * 16, 4 * (16 + 2 * 8)
STATE = 2 * 4 * 8  # heads, keys, values


@pytest.fixture(scope="module")
def model() -> ResNetBKForCausalLM:
    return random_model(**OPTIONS)


def all_bytes(model: torch.nn.Module) -> int:
    return sum(x.nbytes for x in model.state_dict().values())


def test_a_token_reads_the_chosen_experts_alone(model: ResNetBKForCausalLM) -> None:
    state = state_bytes(model)
    assert state == 2 * 4 * (3 * (16 + 2 * 8) + 2 * 2 + 2 * STATE)
    idle = 2 * 4 * EXPERT
    cost = own_cost(model, Pass(context=7))
    assert cost.bytes == all_bytes(model) + state - 3 * idle
    layer = 2 * (IN + OUT + TAPS + EXPERT + 16 * 4) + 14 * STATE
    assert cost.operations == 2 * layer + 2 * 50 * 16
    assert own_cost(model, Pass(context=10**6)) == cost
    two = own_cost(model, Pass(0, sequences=2))
    assert two == Cost(cost.bytes + state + idle, 2 * cost.operations)
    text = own_cost(model, Pass(0, tokens=9))  # which may choose all four experts
    assert text == Cost(all_bytes(model) + state, 9 * cost.operations)
    assert active_parameters(model) == sum(p.numel() for p in model.parameters()) - 2 * 3 * EXPERT


def test_codes_take_fewer_bytes_for_as_many_operations() -> None:
    model = random_model(**{**OPTIONS, "d_model": 64, "expert_size": 64})
    work = Pass(0)
    tokens = torch.randint(50, (2, 20))
    costs = [own_cost(quantized(model, mode, tokens), work) for mode in MODES.values()]
    assert {cost.operations for cost in costs} == {own_cost(model, work).operations}
    eight, four = (cost.bytes for cost in costs)
    whole = own_cost(model, work).bytes
    assert 2 * eight < whole
    assert four < eight


def test_the_cache_of_a_llama_grows_with_the_context() -> None:
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
    )
    weights = 3 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48) + 40 * 32
    cost = llama_cost(config, 1000, Pass(context=9))
    assert cost.bytes == 1000 + 2 * 2 * 2 * 8 * 3 * 10  # keys and values in float16
    assert cost.operations == 2 * weights + 3 * 4 * 32 * 10
    text = llama_cost(config, 1000, Pass(context=9, tokens=4))
    assert text.bytes == 1000 + 2 * 2 * 2 * 8 * 3 * 13
    assert text.operations == 4 * 2 * weights + 3 * 4 * 32 * (10 + 11 + 12 + 13)


def test_a_plain_read_reads_so_many_bytes() -> None:
    assert plain_read(4_000)() == torch.tensor(1000.0)
