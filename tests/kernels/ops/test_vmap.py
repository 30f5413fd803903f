"""torch.func.vmap over the operator equals a loop."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from bkcore.kernels import sweep

FORMS = ["g", "psi", "two_sided"]


def arguments(form: str, size: int = 3) -> list[Tensor]:
    """v, source, energy, eta, hopping, each with `size` variants in front."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(size, *shape, dtype=torch.float64, generator=generator)

    tensors = [normal(2, 6, 4), normal(2, 6, 4), normal(4), 0.3 + normal(1, 4).abs(), normal(5, 4)]
    return tensors if form == "psi" else [tensors[0], *tensors[2:]]


def call(form: str, *tensors: Any) -> Tensor:
    rest: list[Any] = [*tensors, form == "two_sided"]
    v = rest.pop(0)
    source = rest.pop(0) if form == "psi" else None
    return sweep(v, source, *rest)


def subsets(form: str) -> list[list[int]]:
    count = 5 if form == "psi" else 4
    return [*([n] for n in range(count)), list(range(count))]


@pytest.mark.parametrize(("form", "mapped"), [(f, m) for f in FORMS for m in subsets(f)])
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_equals_a_loop(form, mapped, dim):
    every = arguments(form)
    given = [x.movedim(0, dim) if n in mapped else x[0] for n, x in enumerate(every)]
    in_dims = tuple(dim if n in mapped else None for n in range(len(every)))
    got = torch.func.vmap(lambda *xs: call(form, *xs), in_dims)(*given)
    for i in range(3):
        one = [x[i] if n in mapped else x[0] for n, x in enumerate(every)]
        torch.testing.assert_close(got[i], call(form, *one), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("form", FORMS)
def test_many_cotangents_at_once(form):
    inputs = [x[0].requires_grad_() for x in arguments(form)]
    parts = call(form, *inputs)
    cotangents = torch.randn(3, *parts.shape, dtype=torch.float64)
    got = torch.autograd.grad(parts, inputs, cotangents, retain_graph=True, is_grads_batched=True)
    for i, cotangent in enumerate(cotangents):
        want = torch.autograd.grad(parts, inputs, cotangent, retain_graph=True)
        for many, one in zip(got, want, strict=True):
            torch.testing.assert_close(many[i], one, rtol=1e-12, atol=1e-12)
