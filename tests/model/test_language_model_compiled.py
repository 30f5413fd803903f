"""The whole model in one graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.model.conftest import EXECUTED
from tests.slow import combinations


@pytest.fixture(autouse=True)
def fresh_dynamo() -> None:
    torch._dynamo.reset()


def compiled(model: Any) -> Any:
    return torch.compile(model, fullgraph=True, backend="aot_eager")


@pytest.mark.parametrize(
    "executed_form",
    combinations(
        EXECUTED,
        quick=[((None, "float"),), (("ptq_int4", "quantized"),), (("qat_int8", "training"),)],
    ),
    ids=str,
)
def test_logits_in_one_graph(build, executed_form, tokens):
    # Whole vectors only: PyTorch rounds the exponential of SiLU differently in a ragged rest, and
    # the compiled experts work on batches of other sizes.
    model = build(*executed_form, expert_size=64).eval()
    ids = tokens(2, 20)
    with torch.no_grad():
        assert torch.equal(compiled(model)(ids).logits, model(ids).logits)


def test_training_step_in_one_graph(build, tokens):
    model = build()
    ids = tokens(2, 20)

    def gradients(run: Any) -> list[Tensor]:
        model.zero_grad()
        run(ids, labels=ids).loss.backward()
        return [p.grad.clone() for p in model.parameters()]

    for got, want in zip(gradients(compiled(model)), gradients(model), strict=True):
        # The compiled step sums gradients in another order; sums of under 1e3 terms.
        scale = want.abs().max().item() + 1e-12
        assert (got - want).abs().max().item() <= 1e3 * torch.finfo(torch.float32).eps * scale


@torch.no_grad()
def test_a_mask_stays_in_the_graph(build, tokens):
    model, ids = build(expert_size=64), tokens(2, 20)
    mask = torch.ones_like(ids)
    assert torch.equal(compiled(model)(ids, attention_mask=mask).logits, model(ids).logits)
    # Where a state is asked for, its values have to be looked at.
    run = torch.compile(model, backend="eager")
    found = run(ids, attention_mask=mask, use_cache=True)
    assert torch.equal(found.logits, model(ids).logits)
    assert found.cache_params is not None
