"""Sizes of 0: every function forward and backward, on every backend, against the reference."""

from __future__ import annotations

import itertools
from contextlib import AbstractContextManager, ExitStack

import pytest
import torch
from torch import Tensor

from bkcore import kernels
from bkcore.core import resolvent_attention
from bkcore.errors import ShapeError
from bkcore.kernels import use_backend
from bkcore.kernels.backends.cpu import native
from tests.kernels.operators import DIFFERENTIABLE, FUNCTIONS, arguments

SIZES = {
    "sweep": ("batch", "sites", "lanes"),
    "sweep_codes": ("batch", "sites", "lanes"),
    "sweep_rounded": ("batch", "sites", "lanes"),
    "product": ("rows", "inputs", "outputs"),
    "silu": ("rows", "channels"),
    "rms_norm": ("rows", "channels"),
    "unit_length": ("rows", "channels"),
    "short_convolution": ("batch", "sites", "taps", "channels"),
    "dense_product": ("rows", "inputs", "outputs"),
    "softmax": ("rows", "channels"),
    "round_rows": ("rows", "inputs"),
    "round_channels": ("rows", "channels"),
    "round_channels_straight_through": ("rows", "channels"),
    "round_weight": ("rows", "columns"),
    "attention": ("batch", "sites", "heads", "keys", "values"),
    "sweep_step": ("batch", "lanes"),
}
AT_LEAST_ONE = {"sites", "taps"} | {("product", "inputs"), ("round_rows", "inputs")}
CASES = [
    (name, zeros)
    for name, sizes in SIZES.items()
    for count in (1, 2)
    for zeros in itertools.combinations(sizes, count)
]
BACKENDS = ["reference", "triton", *native.supported_isas()]


def on(backend: str) -> AbstractContextManager[object]:
    stack = ExitStack()
    stack.enter_context(use_backend(backend if backend in BACKENDS[:2] else "cpu"))
    if backend not in BACKENDS[:2]:
        stack.enter_context(native.use_isa(backend))
    return stack


def run(name: str, backend: str, **sizes: int) -> list[Tensor]:
    """Results, and the gradients of all that has one."""
    args = arguments(name, **sizes)
    if name not in DIFFERENTIABLE:
        with on(backend), torch.no_grad():
            results = getattr(kernels, name)(**args)
        return list(results) if isinstance(results, tuple) else [results]
    for x in args.values():
        if isinstance(x, Tensor) and x.is_floating_point():
            x.requires_grad_()
    with on(backend):
        results = getattr(kernels, name)(**args)
        results = results if isinstance(results, tuple) else (results,)
        sum(x.square().sum() for x in results if x.requires_grad).backward()
    grads = [x.grad for x in args.values() if isinstance(x, Tensor) and x.requires_grad]
    return [*results, *grads]


def test_every_function_has_its_sizes() -> None:
    assert set(SIZES) == set(FUNCTIONS)


@pytest.mark.parametrize(("name", "zeros"), CASES)
def test_nothing_is_computed_of_nothing(name: str, zeros: tuple[str, ...]) -> None:
    sizes = dict.fromkeys(zeros, 0)
    if name == "attention":
        sizes = {"batch": 1, "sites": 3, "heads": 1, **sizes}  # Triton's interpreter is slow
    if any(zero in AT_LEAST_ONE or (name, zero) in AT_LEAST_ONE for zero in zeros):
        for backend in BACKENDS:
            with pytest.raises(ShapeError):
                run(name, backend, **sizes)
        return
    expected = run(name, BACKENDS[0], **sizes)
    assert not any(x.isnan().any() for x in expected)
    for backend in BACKENDS[1:]:
        if backend == "triton" and len(zeros) > 1:
            continue
        if backend != "triton":
            run(name, backend)
        for got, want in zip(run(name, backend, **sizes), expected, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["reference", *native.supported_isas()])
def test_query_and_key_of_no_values_have_no_gradient(backend: str) -> None:
    def gradients(values: int) -> tuple[Tensor, ...]:
        torch.manual_seed(0)
        query, key, value = torch.randn(3, 1, 40, 2, 5).requires_grad_().unbind()
        hopping = torch.rand(1, 40, 2)
        arguments_ = query, key, value[..., :values], hopping, 0 * hopping, torch.ones(2)
        with on(backend):
            out, g, (_, psi) = resolvent_attention(*arguments_)
            total = out.abs().sum() + g.abs().sum() + psi.sum()
            return torch.autograd.grad(total, (query, key))

    assert all(x.any() for x in gradients(5))  # leaves scratch memory that is not 0
    assert not any(x.any() for x in gradients(0))
