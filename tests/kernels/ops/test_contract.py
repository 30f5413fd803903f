"""What holds for every operator alike, by `bkcore.kernels.ops.contract`."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bkcore import kernels
from bkcore.errors import BackendError
from tests.kernels.operators import DIFFERENTIABLE, OPERATORS, arguments


def test_no_derivative_is_left_out() -> None:
    backward = {name for name in OPERATORS if name.endswith("_backward")}
    assert {f"{name}_backward" for name in DIFFERENTIABLE.values()} == backward


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_a_second_derivative_is_refused(name: str) -> None:
    args = arguments(name)
    leaves = [
        x.requires_grad_() for x in args.values() if isinstance(x, Tensor) and x.is_floating_point()
    ]
    results = getattr(kernels, name)(**args)
    results = results if isinstance(results, tuple) else (results,)
    total = sum(x.square().sum() for x in results if x.requires_grad)
    first = torch.autograd.grad(total, leaves, create_graph=True)
    with pytest.raises(BackendError, match="only once"):
        torch.stack([x.square().sum() for x in first]).sum().backward()
