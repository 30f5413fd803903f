"""One site at a time equals the sweep over all sites."""

from __future__ import annotations

import pytest
import torch

from bkcore.errors import DTypeError, ShapeError
from bkcore.kernels import step, sweep, use_backend


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("with_source", [False, True])
@pytest.mark.parametrize(("batch", "lanes"), [(1, 16), (3, 45), (1, 1500)])
def test_steps_equal_the_sweep(backend, dtype, with_source, batch, lanes):
    v, source = torch.randn(2, batch, 30, lanes, dtype=dtype)
    energy, hopping = torch.randn(2, lanes, dtype=dtype)
    eta = 0.2 + torch.rand(lanes, dtype=dtype)
    with use_backend(backend):
        want = sweep(v, source if with_source else None, energy, eta[None], hopping[None])
        state = torch.zeros(batch, 4 if with_source else 2, lanes, dtype=dtype)
        for i in range(30):
            site = source[:, i].contiguous() if with_source else None
            assert step(state, v[:, i].contiguous(), site, energy, eta, hopping) is state
            if backend == "cpu":
                assert torch.equal(state, want[:, i])
            else:  # PyTorch rounds complex numbers otherwise at the ragged end of a tensor
                torch.testing.assert_close(state, want[:, i], rtol=1e-4, atol=1e-5)


def test_bad_input_raises():
    row, state = torch.ones(2, 5), torch.zeros(2, 4, 5)
    good = (state, row, row, row[0], row[0], row[0])
    step(*good)
    with pytest.raises(ShapeError, match="do not fit"):
        step(state, row, None, *good[3:])
    with pytest.raises(ShapeError, match="do not fit"):
        step(state, row[:1], *good[2:])
    with pytest.raises(DTypeError, match="float32"):
        step(state.double(), *good[1:])
    with pytest.raises(ShapeError, match="contiguous"):
        step(*good[:3], row, *good[4:])
