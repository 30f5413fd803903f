"""Resolvent attention against dense resolvents, gated linear attention, and itself in pieces."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bkcore import resolvent_attention
from bkcore.errors import DTypeError, InputError, ShapeError


def problem(sites: int = 12, dtype: torch.dtype = torch.float64, seed: int = 0) -> dict[str, Any]:
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float64).to(dtype)

    return {
        "query": normal(2, sites, 3, 4),
        "key": normal(2, sites, 3, 4),
        "value": normal(2, sites, 3, 5),
        "hopping": normal(2, sites, 3).sigmoid(),
        "potential": normal(2, sites, 3),
        "eta": normal(3).square() + 0.1,
    }


def dense(p: dict[str, Tensor]) -> Tensor:
    """out from the inverse of H - i eta of the first sites, one matrix at a time."""
    query, key, value, t = (p[name] for name in ("query", "key", "value", "hopping"))
    out = torch.zeros(value.shape, dtype=torch.complex128)
    batch, sites, heads, _ = value.shape
    for b in range(batch):
        for h in range(heads):
            lower = torch.eye(sites, dtype=torch.float64) - torch.diag(t[b, 1:, h], -1)
            hamiltonian = lower @ lower.T + torch.diag(p["potential"][b, :, h])
            shifted = hamiltonian - 1j * p["eta"][h] * torch.eye(sites, dtype=torch.float64)
            for i in range(sites):
                row = torch.linalg.inv(shifted[: i + 1, : i + 1])[i]
                scores = key[b, : i + 1, h] @ query[b, i, h]
                out[b, i, h] = (row * scores) @ value[b, : i + 1, h].to(row.dtype)
    return out


def test_it_is_the_last_row_of_the_resolvent():
    p = problem()
    out, g, _ = resolvent_attention(**p)
    # Condition at most (|H| + 1) / eta < 100 at eta >= 0.1, in float64.
    torch.testing.assert_close(out, dense(p), rtol=0, atol=1e-12)
    eta = p["eta"]
    assert bool(((g - 0.5j / eta).abs() <= 0.5 / eta * (1 + 1e-12)).all())


def test_without_a_potential_it_is_gated_linear_attention():
    p = problem()
    p["potential"] = torch.zeros_like(p["potential"])
    p["eta"] = torch.full((3,), 1e-13, dtype=torch.float64)
    out, g, (_, psi) = resolvent_attention(**p)
    memory = torch.zeros(2, 3, 4, 5, dtype=torch.float64)
    for i in range(p["key"].shape[1]):
        written = p["key"][:, i, :, :, None] * p["value"][:, i, :, None, :]
        memory = written + p["hopping"][:, i, :, None, None] * memory
        read = (p["query"][:, i, :, :, None] * memory).sum(2)
        torch.testing.assert_close(out[:, i].real, read, rtol=0, atol=1e-10)
    torch.testing.assert_close(psi[:, :, 0], memory, rtol=0, atol=1e-10)
    torch.testing.assert_close(g.real, torch.ones_like(g.real), rtol=0, atol=1e-10)


@given(sites=st.integers(2, 70), cut=st.integers(1, 69), seed=st.integers(0, 2**16))
@settings(max_examples=20, deadline=None)
def test_it_goes_on_from_a_state_bit_for_bit(sites, cut, seed):
    cut = min(cut, sites - 1)
    p = problem(sites, torch.float32, seed)
    out, g, state = resolvent_attention(**p)
    first = {name: x if name == "eta" else x[:, :cut] for name, x in p.items()}
    second = {name: x if name == "eta" else x[:, cut:] for name, x in p.items()}
    out1, g1, between = resolvent_attention(**first)
    out2, g2, after = resolvent_attention(**second, state=between)
    assert torch.equal(torch.cat((out1, out2), 1), out)
    assert torch.equal(torch.cat((g1, g2), 1), g)
    assert all(torch.equal(a, b) for a, b in zip(after, state, strict=True))


def test_a_state_of_zeros_is_none_chain_by_chain():
    p = problem(6, torch.float32)
    out, _, (g, psi) = resolvent_attention(**p)
    again, _, _ = resolvent_attention(**p, state=(torch.zeros_like(g), torch.zeros_like(psi)))
    assert torch.equal(again, out)
    mixed = (torch.stack((g[0], 0 * g[1])), torch.stack((psi[0], 0 * psi[1])))
    later, _, _ = resolvent_attention(**p, state=mixed)
    assert torch.equal(later[1], out[1])
    assert torch.equal(later[0], resolvent_attention(**p, state=(g, psi))[0][0])


def test_it_is_causal_bit_for_bit():
    p = problem(40, torch.float32)
    before, _, _ = resolvent_attention(**p)
    for name in ("query", "key", "value", "hopping", "potential"):
        changed = {**p, name: p[name].clone()}
        changed[name][:, 17] += 0.5
        after, _, _ = resolvent_attention(**changed)
        assert torch.equal(after[:, :17], before[:, :17])
        assert not torch.equal(after[:, 17], before[:, 17])


def test_gradients():
    p = problem(5)
    leaves = [x.requires_grad_() for x in p.values()]

    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        given: dict[str, Any] = dict(zip(p, tensors, strict=True))
        out, g, state = resolvent_attention(**given)
        again, _, (_, psi) = resolvent_attention(**given, state=state)
        return out, g, again, psi

    assert torch.autograd.gradcheck(function, leaves)


def test_half_precision_is_computed_in_float32():
    p = {name: x.bfloat16() for name, x in problem().items()}
    out, _, _ = resolvent_attention(**p)
    exact, _, _ = resolvent_attention(**{name: x.float() for name, x in p.items()})
    assert torch.equal(out, exact)


def test_bad_input_is_named():
    p = problem()
    with pytest.raises(InputError, match="eta"):
        resolvent_attention(**{**p, "eta": -p["eta"]})
    with pytest.raises(DTypeError, match="query"):
        resolvent_attention(**{**p, "query": p["query"] + 0j})
    with pytest.raises(ShapeError, match="key must be"):
        resolvent_attention(**{**p, "key": p["key"][:, :, :, :1]})
