"""One site at a time equals the sweep over all sites."""

from __future__ import annotations

import pytest
import torch

from bkcore.errors import DTypeError, InputError, ShapeError
from bkcore.kernels import sweep, sweep_step, use_backend


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
            assert sweep_step(state, v[:, i].contiguous(), site, energy, eta, hopping) is state
            if backend == "cpu":
                assert torch.equal(state, want[:, i])
            else:  # PyTorch rounds complex numbers otherwise at the ragged end of a tensor
                torch.testing.assert_close(state, want[:, i], rtol=1e-4, atol=1e-5)


def test_bad_input_raises():
    row, state = torch.ones(2, 5), torch.zeros(2, 4, 5)
    good = (state, row, row, row[0], row[0], row[0])
    sweep_step(*good)
    with pytest.raises(ShapeError, match=r"\(B, 2, H\) without a source"):
        sweep_step(state, row, None, *good[3:])
    with pytest.raises(ShapeError, match="state must be"):
        sweep_step(state[0], *good[1:])
    with pytest.raises(ShapeError, match=r"v must be \(2, 5\)"):
        sweep_step(state, row[:1], *good[2:])
    with pytest.raises(ShapeError, match="energy must be"):
        sweep_step(*good[:3], row, *good[4:])
    with pytest.raises(DTypeError, match=r"v must be torch.float64"):
        sweep_step(state.double(), *good[1:])
    with pytest.raises(InputError, match=r"eta is on meta but the others are on cpu"):
        sweep_step(*good[:4], row[0].to("meta"), row[0])
    with pytest.raises(ShapeError, match="v must be contiguous"):
        sweep_step(state, torch.ones(5, 2).T, *good[2:])


def test_one_channel_of_a_conjugate_raises():
    eta = torch.complex(torch.ones(1), -torch.ones(1)).conj().imag
    assert eta.is_contiguous()
    one = torch.ones(1)
    with pytest.raises(ShapeError, match="resolve_neg"):
        sweep_step(torch.zeros(1, 2, 1), torch.ones(1, 1), None, one, eta, one)


def test_a_gradient_is_not_lost():
    row, state = torch.ones(1, 5), torch.zeros(1, 2, 5)
    energy = torch.zeros(5, requires_grad=True)
    with pytest.raises(InputError, match="no_grad"):
        sweep_step(state, row, None, energy, row[0], row[0])
    with torch.no_grad():
        sweep_step(state, row, None, energy, row[0], row[0])
