"""The fast selective scan is transformers' own, to rounding, and so are its gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import MambaConfig, MambaForCausalLM
from transformers.models.mamba import modeling_mamba

from bkcore.comparison.selective_scan import fast_selective_scan, selective_scan


def arguments(sites: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(sites)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype).requires_grad_()

    batch, channels, states = 2, 5, 3
    return {
        "hidden_states": draw(batch, channels, sites),
        "dt": draw(batch, channels, sites),
        "A": (-draw(channels, states).exp()).detach().requires_grad_(),
        "B": draw(batch, states, sites),
        "C": draw(batch, states, sites),
        "D": draw(channels),
        "z": draw(batch, channels, sites),
        "delta_bias": draw(channels),
    }


@pytest.mark.parametrize("sites", [1, 2, 17])
def test_equals_transformers_with_gradients(sites: int) -> None:
    given = arguments(sites, torch.float32)  # transformers' fallback rounds to float32 itself
    weight = torch.randn(2, 5, sites, generator=torch.Generator().manual_seed(1))
    results = []
    for scan in (modeling_mamba.mamba_selective_scan, selective_scan):
        y = scan(**given, delta_softplus=True)
        results.append((y, *torch.autograd.grad((y * weight).sum(), tuple(given.values()))))
    for name, expected, found in zip(["y", *given], *results, strict=True):
        torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5, msg=name)


def test_gradients_of_the_gradient_check() -> None:
    given = arguments(4)
    names = list(given)

    def scan(*tensors: Tensor) -> Tensor:
        return selective_scan(**dict(zip(names, tensors, strict=True)), delta_softplus=True)

    assert torch.autograd.gradcheck(scan, tuple(given.values()))


def test_serves_transformers_model_inside_of_the_block_only() -> None:
    torch.manual_seed(0)
    config = MambaConfig(
        vocab_size=11, hidden_size=8, num_hidden_layers=2, state_size=4, use_cache=False
    )
    model = MambaForCausalLM(config).eval()
    ids = torch.randint(11, (2, 9))
    slow = modeling_mamba.mamba_selective_scan
    expected = model(input_ids=ids).logits
    with fast_selective_scan():
        assert modeling_mamba.mamba_selective_scan is selective_scan
        torch.testing.assert_close(model(input_ids=ids).logits, expected)
    assert modeling_mamba.mamba_selective_scan is slow


def test_refuses_what_it_does_not_compute() -> None:
    given = arguments(2)
    with pytest.raises(NotImplementedError, match="use_cache=False"):
        selective_scan(**given, delta_softplus=True, return_last_state=True)
    with pytest.raises(NotImplementedError, match="use_cache=False"):
        selective_scan(**given)
