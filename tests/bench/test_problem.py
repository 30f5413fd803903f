"""The truth that results are checked against before they are timed."""

import pytest
import torch
from torch import Tensor

from bkcore.bench import problem as problems
from bkcore.bench.problem import (
    FORMS,
    check_gradients,
    check_parts,
    random_problem,
    repeat_channels,
    true_gradients,
    true_parts,
)
from bkcore.core import oracle
from bkcore.errors import BenchmarkError

SHAPE = (2, 40, 19)


def cotangent(shape: torch.Size, period: int) -> Tensor:
    distinct = torch.randn(*shape[:3], period, generator=torch.Generator().manual_seed(3))
    return repeat_channels(distinct, shape[3])


@pytest.fixture(autouse=True)
def few_channels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(problems, "_DISTINCT", 2 * 40 * 6)


@pytest.mark.parametrize("form", FORMS)
def test_channels_repeat_with_an_odd_period(form: str) -> None:
    problem = random_problem(form, SHAPE)
    assert problem.period == 7
    assert all(torch.equal(x[..., 7:14], x[..., :7]) for x in problem.inputs())
    assert all(x.is_contiguous() for x in problem.inputs())
    assert not torch.equal(problem.v[..., 1], problem.v[..., 2])


@pytest.mark.parametrize("form", FORMS)
def test_truth_is_that_of_dense_matrices(form: str) -> None:
    problem = random_problem(form, SHAPE)
    truth, channel = true_parts(problem), 4
    v, energy, eta = problem.v[1, :, channel], problem.energy[channel], problem.eta[channel]
    z = torch.complex(energy.double(), eta.double())
    green = oracle.diagonal if form == "two-sided" else oracle.left_connected
    found = torch.complex(truth[1, :, 0, channel], truth[1, :, 1, channel])
    torch.testing.assert_close(found, green(v, z, onsite=0.0))
    if problem.source is not None:
        psi = oracle.propagated(v, problem.source[1, :, channel], z, onsite=0.0)
        found = torch.complex(truth[1, :, 2, channel], truth[1, :, 3, channel])
        torch.testing.assert_close(found, psi)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("sites", [450, 512])
def test_windows_change_nothing(form: str, sites: int, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = random_problem(form, (2, sites, 3))
    parts = true_parts(problem)
    weights = cotangent(parts.shape, 3)
    gradients = true_gradients(problem, weights)
    monkeypatch.setattr(problems, "_WINDOW", 64)
    torch.testing.assert_close(true_parts(problem), parts, rtol=1e-12, atol=1e-12)
    for found, want in zip(true_gradients(problem, weights), gradients, strict=True):
        torch.testing.assert_close(found, want, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("form", FORMS)
def test_right_results_pass(form: str) -> None:
    problem = random_problem(form, SHAPE).with_gradients()
    parts = problem.run()
    check_parts(problem, parts.detach(), true_parts(problem))
    weights = cotangent(parts.shape, problem.period)
    gradients = torch.autograd.grad(parts, problem.inputs(), weights)
    check_gradients(problem, gradients, true_gradients(problem, weights))


@pytest.mark.parametrize("wrong", [1.01, float("nan")])
@pytest.mark.parametrize("channel", [0, 9, 18])
def test_one_wrong_element_is_found(wrong: float, channel: int) -> None:
    problem = random_problem("g", SHAPE)
    parts = problem.run()
    parts[1, 20, 1, channel] *= wrong
    with pytest.raises(BenchmarkError, match=r"wrong result.*g of shape \(2, 40, 19\)"):
        check_parts(problem, parts, true_parts(problem))


def test_compulsory_bytes() -> None:
    bytes_an_element = {"g": 12, "g+psi": 24, "two-sided": 12}
    for form, count in bytes_an_element.items():
        assert random_problem(form, SHAPE).compulsory_bytes == count * 2 * 40 * 19
