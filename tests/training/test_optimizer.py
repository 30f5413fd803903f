"""Muon for the matrices between hidden features, AdamW for all else, as one optimizer."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from bkcore.errors import InputError
from bkcore.model import LanguageModel
from bkcore.training.optimizer import MuonWithAdamW

RATE = 1e-2


def resnet_bk() -> PreTrainedModel:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"num_experts": 2, "expert_size": 24, "num_heads": 2, "key_size": 4}
    return LanguageModel(50, 16, 1, 16, **sizes)


def gpt2(tied: bool) -> PreTrainedModel:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "n_embd": 16,
        "n_layer": 1,
        "n_head": 2,
        "n_positions": 16,
        "vocab_size": 50,
    }
    config = GPT2Config(**sizes, bos_token_id=0, eos_token_id=0, tie_word_embeddings=tied)
    return GPT2LMHeadModel(config).eval()  # no dropout


def optimizer(model: PreTrainedModel, weight_decay: float = 0.0) -> MuonWithAdamW:
    decayed = [name for name, p in model.named_parameters() if p.dim() >= 2]
    return MuonWithAdamW(model, decayed, RATE, weight_decay)


def backward(model: PreTrainedModel) -> None:
    model.zero_grad()
    ids = torch.randint(0, 50, (4, 16), generator=torch.Generator().manual_seed(1))
    loss: Tensor = model(ids, labels=ids).loss
    loss.backward()


def steps(model: PreTrainedModel, moved_by: Optimizer, count: int) -> None:
    for _ in range(count):
        backward(model)
        moved_by.step()


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def by_muon(model: PreTrainedModel) -> set[str]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    steps(model, joint := optimizer(model), 1)
    states = joint.state_dict()["muon"]["state"]
    return {names[id(joint.param_groups[0]["params"][place])] for place in states}


def test_muon_gets_the_linear_layers_of_resnet_bk() -> None:
    experts = {f"experts.experts.{n}.{name}" for n in (0, 1) for name in ("up", "down")}
    linear = {"mixer.in_proj", "mixer.out_proj", "experts.router"} | experts
    assert by_muon(resnet_bk()) == {f"layers.0.{name}.weight" for name in linear}


@pytest.mark.parametrize("tied", [True, False])
def test_muon_gets_neither_embedding_nor_head_of_gpt2(tied: bool) -> None:
    names = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert by_muon(gpt2(tied)) == {f"transformer.h.0.{name}.weight" for name in names}


def test_a_model_without_linear_layers_is_refused() -> None:
    model = gpt2(tied=True)
    model.get_submodule("transformer").h = nn.ModuleList()
    with pytest.raises(InputError, match="has none except its head"):
        optimizer(model)


def orthogonal(gradient: Tensor) -> Tensor:
    """Five steps of the Newton-Schulz iteration of Jordan et al. on the singular values."""
    u, values, v = torch.linalg.svd(gradient.double(), full_matrices=False)
    values = values / values.norm()
    for _ in range(5):
        values = 3.4445 * values - 4.775 * values**3 + 2.0315 * values**5
    return u * values @ v


def test_a_matrix_moves_by_its_orthogonal_gradient_and_the_rest_down_the_slope() -> None:
    model = gpt2(tied=True)
    before = weights(model)
    steps(model, joint := optimizer(model), 1)
    matrices = {id(parameter) for parameter in joint.param_groups[0]["params"]}
    for name, old in before.items():
        new = model.get_parameter(name)
        step, gradient = old - new.detach(), new.grad
        assert gradient is not None
        assert float((step * gradient).sum()) > 0, name
        if id(new) in matrices:
            expected = RATE * 0.2 * max(step.shape) ** 0.5 * orthogonal(gradient)
            # The iteration is in bfloat16, of 8 bits. A step multiplies an error by as much as it
            # does a small singular value, 3.4 times, until that is near 1: three steps at most
            # here. From then on the factor is below 1.
            error = (step - expected).norm() / expected.norm()
            assert float(error) < 3.4445**3 * 2**-8, name


def test_every_weight_moves_and_only_matrices_decay() -> None:
    model, plain = gpt2(tied=True), gpt2(tied=True)
    before = weights(model)
    steps(model, optimizer(model, weight_decay=0.5), 1)
    steps(plain, optimizer(plain), 1)
    for name, old in before.items():
        decayed, new = model.get_parameter(name).detach(), plain.get_parameter(name).detach()
        assert not torch.equal(new, old), name
        shrunk = RATE * 0.5 * old if old.dim() >= 2 else torch.zeros_like(old)
        # To float32 rounding of numbers whose size is that of the weights, 1 at most.
        torch.testing.assert_close(new - decayed, shrunk, rtol=0, atol=5e-7, msg=name)


def test_a_schedule_reaches_both_before_and_after_loading() -> None:
    model = resnet_bk()
    joint = optimizer(model)
    steps(model, joint, 2)
    joint.load_state_dict(joint.state_dict())
    LambdaLR(joint, lambda _: 0.0)
    before = weights(model)
    steps(model, joint, 1)
    for name, weight in before.items():
        assert torch.equal(model.get_parameter(name), weight), name


def test_what_is_loaded_goes_on_as_if_it_had_not_stopped() -> None:
    whole = resnet_bk()
    steps(whole, optimizer(whole), 4)
    model = resnet_bk()
    steps(model, first := optimizer(model), 2)
    second = optimizer(model)
    second.load_state_dict(first.state_dict())
    steps(model, second, 2)
    for name, weight in weights(whole).items():
        assert torch.equal(model.get_parameter(name), weight), name
