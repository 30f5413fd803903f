"""Changing a token leaves every logit before it, and every other sequence, bit-identical."""

from __future__ import annotations

import pytest
import torch

from bkcore.model.moe import Expert


def positions(length: int) -> list[int]:
    return sorted({0, 1, length // 3, length // 2, length - 1} & set(range(length)))


# The longest is ten times n_seq; with three sequences its experts serve more than one block.
@pytest.mark.parametrize("length", [1, 2, 3, 17, 64, 300])
@torch.no_grad()
def test_no_logit_sees_the_future_or_another_sequence(build, tokens, executed_form, length):
    model = build(*executed_form)
    ids = tokens(3, length)
    logits = model(ids).logits
    assert torch.isfinite(logits).all()
    for position in positions(length):
        changed = ids.clone()
        changed[1, position] = (changed[1, position] + 1 + position) % model.config.vocab_size
        assert changed[1, position] != ids[1, position]
        other = model(changed).logits
        assert torch.equal(other[1, :position], logits[1, :position])
        assert torch.equal(other[[0, 2]], logits[[0, 2]])
        assert not torch.equal(other[1, position], logits[1, position])


@torch.no_grad()
def test_many_changes_at_once(build, tokens, executed_form):
    """Replace the whole future, and the other sequences too: the load of every expert changes."""
    model = build(*executed_form)
    ids = tokens(4, 100)
    loads: list[list[int]] = []
    for expert in (module for module in model.modules() if isinstance(module, Expert)):
        expert.register_forward_hook(lambda _, inputs, __: loads[-1].append(len(inputs[0])))
    loads.append([])
    logits = model(ids).logits
    for position in (1, 5, 50, 99):
        changed = tokens(4, 100)
        changed[2, :position] = ids[2, :position]
        loads.append([])
        other = model(changed).logits
        assert loads[-1] != loads[0], "the experts serve as many tokens as before"
        assert torch.equal(other[2, :position], logits[2, :position])


@torch.no_grad()
def test_the_core_carries_the_past_beyond_the_convolution(build, tokens, executed_form):
    """Without it the tests above would hold for a model that ignores its core."""
    model = build(*executed_form)
    ids = tokens(1, 64)
    changed = ids.clone()
    changed[0, 10] = (changed[0, 10] + 1) % model.config.vocab_size
    reach = model.config.n_layers * (model.config.conv_width - 1)
    after = slice(10 + reach + 1, None)
    assert not torch.equal(model(changed).logits[0, after], model(ids).logits[0, after])


@torch.no_grad()
def test_gradient_never_flows_to_the_past(build, tokens):
    model = build()
    ids = tokens(1, 20)
    with torch.enable_grad():
        hidden = model.embedding(ids).detach().requires_grad_()
        x = hidden
        for layer in model.layers:
            x, _, _ = layer(x)
        x[0, 12].sum().backward()
    assert (hidden.grad[0, 13:] == 0).all()
    assert (hidden.grad[0, :13].abs().sum(-1) > 0).all()
