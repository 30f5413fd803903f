"""Resolvent attention: the oracle, both backends, every gradient, and streams cut anywhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bkcore.errors import BackendError, DTypeError, ShapeError
from bkcore.kernels import attention, use_backend
from bkcore.kernels.backends.cpu import native

_NAMES = ("v", "hopping", "energy", "eta", "query", "key", "value", "first_g", "first_psi")


def problem(
    batch: int = 2,
    sites: int = 5,
    heads: int = 3,
    keys: int = 4,
    values: int = 5,
    *,
    dtype: torch.dtype = torch.float64,
    eta: float = 0.1,
    first: bool = False,
    seed: int = 0,
) -> dict[str, Any]:
    """Potentials of order one around the edge of the band, hoppings in (0, 1)."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float64).to(dtype)

    hopping = normal(batch, sites, heads).sigmoid()
    return {
        "v": 1 + hopping**2 + 0.3 * normal(batch, sites, heads),
        "hopping": hopping,
        "energy": 0.1 * normal(heads),
        "eta": eta * (1 + normal(heads) ** 2),
        "query": normal(batch, sites, heads, keys),
        "key": normal(batch, sites, heads, keys),
        "value": normal(batch, sites, heads, values),
        "first_g": normal(batch, heads, 2).abs() if first else None,
        "first_psi": normal(batch, heads, 2, keys, values) if first else None,
    }


def oracle(p: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """g (B, N, H) and out (B, N, H, U) from dense inverses in complex128."""
    v, t, query, key, value = (
        p[name].double() for name in ("v", "hopping", "query", "key", "value")
    )
    batch, sites, heads = v.shape
    g = torch.zeros(batch, sites, heads, dtype=torch.complex128)
    out = torch.zeros(*value.shape, dtype=torch.complex128)
    scores = torch.einsum("bihk,bjhk->bhij", query, key)
    for b in range(batch):
        for h in range(heads):
            z = complex(p["energy"][h], p["eta"][h])
            bonds = t[b, 1:, h]
            h_minus_z = (torch.diag(v[b, :, h]) - torch.diag(bonds, 1) - torch.diag(bonds, -1)) - (
                z * torch.eye(sites, dtype=torch.complex128)
            )
            for i in range(sites):
                row = torch.linalg.inv(h_minus_z[: i + 1, : i + 1])[i]
                g[b, i, h] = row[i]
                weights = row * scores[b, h, i, : i + 1]
                out[b, i, h] = weights @ value[b, : i + 1, h].to(torch.complex128)
    return g, out


def joined(parts: Tensor, dim: int) -> Tensor:
    real, imag = parts.unbind(dim)
    return torch.complex(real, imag)


@pytest.fixture(params=["reference", *native.supported_isas()])
def backend(request):
    if request.param == "reference":
        with use_backend("reference"):
            yield
        return
    with use_backend("cpu"), native.use_isa(request.param):
        yield


@pytest.mark.parametrize("sites", [1, 2, 31, 33, 70])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_is_the_dense_resolvent(backend, sites, dtype):
    p = problem(sites=sites, dtype=dtype, eta=0.3)
    g, out, psi = attention(**p)
    exact_g, exact_out = oracle(p)
    # The recurrences are backward stable; a chain with |Im z| >= 0.3 has a condition below
    # (|v| + 2 |t| + |z|) / eta = 20, and sums of up to 70 terms round with u sqrt(70).
    bound = 400 * torch.finfo(dtype).eps
    torch.testing.assert_close(joined(g, 3).to(exact_g), exact_g, rtol=bound, atol=bound)
    scale = exact_out.abs().max().item()
    torch.testing.assert_close(joined(out, 3).to(exact_out), exact_out, rtol=0, atol=bound * scale)
    read = torch.einsum("bhk,bhcku->bhcu", p["query"][:, -1], psi)
    torch.testing.assert_close(read, out[:, -1], rtol=0, atol=bound * scale)


@given(
    batch=st.integers(1, 3),
    sites=st.integers(1, 67),
    heads=st.integers(1, 4),
    keys=st.integers(1, 19),
    values=st.integers(1, 35),
    first=st.booleans(),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=40, deadline=None)
def test_backends_agree_on_any_shape(batch, sites, heads, keys, values, first, seed):
    p = problem(batch, sites, heads, keys, values, first=first, seed=seed)
    results, gradients = [], []
    for name in ("cpu", "reference"):
        leaves: dict[str, Any] = {
            k: None if x is None else x.clone().requires_grad_() for k, x in p.items()
        }
        with use_backend(name):
            outputs = attention(**leaves)
            weights = [torch.cos(torch.arange(x.numel()).double()).view_as(x) for x in outputs]
            sums = [(x * w).sum() for x, w in zip(outputs, weights, strict=True)]
            torch.stack(sums).sum().backward()
        results.append(outputs)
        gradients.append([x.grad for x in leaves.values() if x is not None])
    for ours, theirs in zip(
        [*results[0], *gradients[0]], [*results[1], *gradients[1]], strict=True
    ):
        scale = max(1.0, theirs.abs().max().item())
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10 * scale)


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("sites", [1, 4, 35])
def test_gradients_of_all_inputs(backend, sites, first):
    sizes = (1, sites, 2, 2, 3) if sites > 10 else (2, sites, 2, 3, 2)
    p = problem(*sizes, first=first)
    names = [name for name in _NAMES if p[name] is not None]

    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        return attention(**dict(zip(names, tensors, strict=True)))

    inputs = [p[name].requires_grad_() for name in names]
    assert torch.autograd.gradcheck(function, inputs, fast_mode=sites > 10)


@given(sites=st.integers(2, 80), cut=st.integers(1, 79), seed=st.integers(0, 2**16))
@settings(max_examples=30, deadline=None)
def test_a_stream_cut_anywhere_is_the_same_bits(sites, cut, seed):
    cut = min(cut, sites - 1)
    p = problem(2, sites, 2, 5, 18, dtype=torch.float32, seed=seed)
    g, out, psi = attention(**p)
    sequences = ("v", "hopping", "query", "key", "value")

    def part(where: slice, state: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        return attention(**{**p, **{name: p[name][:, where] for name in sequences}, **state})

    g1, out1, psi1 = part(slice(0, cut), {})
    g2, out2, psi2 = part(slice(cut, None), {"first_g": g1[:, -1], "first_psi": psi1})
    assert torch.equal(torch.cat((g1, g2), 1), g)
    assert torch.equal(torch.cat((out1, out2), 1), out)
    assert torch.equal(psi2, psi)


def test_threads_change_no_bit():
    p: dict[str, Any] = {
        k: None if x is None else x.requires_grad_()
        for k, x in problem(4, 70, 4, 32, 32, dtype=torch.float32).items()
    }
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            outputs = attention(**p)
            total = torch.stack([x.square().sum() for x in outputs]).sum()
            leaves = [x for x in p.values() if x is not None]
            results.append([*outputs, *torch.autograd.grad(total, leaves)])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_nan_goes_through_and_stays_in_its_chain(backend):
    p = problem(2, 40, 3, dtype=torch.float32)
    clean = attention(**p)
    p["v"][1, 7, 2] = torch.nan
    g, out, psi = attention(**p)
    assert g[1, 7:, 2].isnan().all()
    assert out[1, 7:, 2].isnan().all()
    assert psi[1, 2].isnan().all()
    for x, was in zip((g, out), clean[:2], strict=True):
        assert torch.equal(x[1, :7], was[1, :7])
        assert torch.equal(x[0], was[0])
        assert torch.equal(x[1, :, :2], was[1, :, :2])


def test_operator_checks():
    p = problem(2, 5, 2, 3, 4, dtype=torch.float32)
    arguments = (*[p[name] for name in _NAMES], True)
    torch.library.opcheck(torch.ops.bkcore.attention.default, arguments)
    leaves = [x if x is None else x.clone().requires_grad_() for x in arguments[:-1]]
    torch.library.opcheck(torch.ops.bkcore.attention.default, (*leaves, True))


def test_what_does_not_fit_is_refused():
    p = problem()
    with pytest.raises(ShapeError, match="key must be"):
        attention(**{**p, "key": p["key"][..., :2]})
    with pytest.raises(DTypeError, match="eta must be"):
        attention(**{**p, "eta": p["eta"].float()})
    with pytest.raises(ShapeError, match="N >= 1"):
        attention(**{**p, "v": p["v"][:, :0]})
    with pytest.raises(DTypeError, match="float32 or float64"):
        attention(**{**p, "v": p["v"].half()})


def test_second_derivatives_are_refused():
    p = problem()
    p["v"].requires_grad_()
    out = attention(**p)[1]
    (gradient,) = torch.autograd.grad(out.square().sum(), p["v"], create_graph=True)
    with pytest.raises(BackendError, match="only once"):
        gradient.sum().backward()
