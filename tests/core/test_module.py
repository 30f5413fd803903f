"""BirmanSchwingerCore."""

from __future__ import annotations

import pytest
import torch

from bkcore.core import BirmanSchwingerCore, resolvent_diagonal
from bkcore.errors import DTypeError, InputError, ShapeError


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lead", [(), (3,), (2, 3)])
def test_features_are_the_resolvent_diagonal(causal, lead):
    core = BirmanSchwingerCore(7, epsilon=0.5, energy=0.2, hopping=0.8, onsite=-1.0, causal=causal)
    v = torch.randn(*lead, 7)
    features = core(v)
    g = resolvent_diagonal(v, 0.2 + 0.5j, hopping=0.8, onsite=-1.0, causal=causal)
    assert features.shape == (*lead, 7, 2)
    assert features.dtype == torch.float32
    assert features.is_contiguous()
    assert torch.equal(features, torch.view_as_real(g))


def test_default_is_two_sided_at_z_equal_i():
    v = torch.randn(4, 6)
    core = BirmanSchwingerCore(n_seq=6)
    assert core.n_seq == 6
    assert torch.equal(core(v), torch.view_as_real(resolvent_diagonal(v, 1j)))


def test_gradient_reaches_v():
    v = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(BirmanSchwingerCore(5), v)


def test_has_no_state_and_prints_its_settings():
    core = BirmanSchwingerCore(5, epsilon=0.25)
    assert not core.state_dict()
    assert "n_seq=5, epsilon=0.25" in repr(core)


@pytest.mark.parametrize("shape", [(6,), (5, 6), ()])
def test_wrong_length_names_shape_and_remedy(shape):
    with pytest.raises(ShapeError, match=r"v must be \(\.\.\., 5\), not .*another n_seq"):
        BirmanSchwingerCore(5)(torch.zeros(shape))


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64])
def test_wrong_dtype(dtype):
    with pytest.raises(DTypeError):
        BirmanSchwingerCore(5)(torch.zeros(5, dtype=dtype))


@pytest.mark.parametrize("epsilon", [0.0, -1.0, float("nan")])
def test_epsilon_must_be_positive(epsilon):
    with pytest.raises(InputError, match="epsilon must be > 0"):
        BirmanSchwingerCore(5, epsilon)


def test_n_seq_must_be_positive():
    with pytest.raises(InputError, match="n_seq must be an integer"):
        BirmanSchwingerCore(0)
