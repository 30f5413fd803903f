"""The mixture of experts: no token dropped, exact sums, a balancing loss that is 1 when even."""

from __future__ import annotations

import copy
import math
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from bkcore.model import ResNetBKConfig, ResNetBKForCausalLM
from bkcore.model.moe import Expert, MixtureOfExperts, counting_load


def mixture(**options) -> Any:
    sizes: dict[str, Any] = {
        "d_model": 12,
        "num_experts": 5,
        "experts_per_token": 2,
        "expert_size": 20,
        "num_heads": 1,
    }
    return MixtureOfExperts(ResNetBKConfig(**{**sizes, **options})).eval()


def dense(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """Token by token, in float64, with no batching at all."""
    layer = layer.double()
    out = torch.empty_like(x, dtype=torch.float64)
    for index, token in enumerate(x.double().flatten(0, 1)):
        probabilities = F.linear(token, layer.router.weight).softmax(-1)
        chosen = probabilities.argsort(descending=True)[: layer.experts_per_token]
        weights = probabilities[chosen] / probabilities[chosen].sum()
        total = torch.zeros_like(token)
        for weight, expert in zip(weights, chosen, strict=True):
            up, down = layer.experts[expert].up.weight, layer.experts[expert].down.weight
            total += weight * F.linear(F.silu(F.linear(token, up)), down)
        out.view(-1, x.shape[-1])[index] = total
    return out


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("experts_per_token", [1, 2, 5])
@pytest.mark.parametrize("shape", [(1, 1), (2, 7), (3, 150)])
@torch.no_grad()
def test_output_is_the_dense_reference(shape, experts_per_token, training):
    layer = mixture(experts_per_token=experts_per_token).train(training)
    x = torch.randn(*shape, 12)
    out, _ = layer(x)
    assert out.shape == x.shape
    # Sums of 12 and 20 products of order 1 in float32.
    torch.testing.assert_close(out.double(), dense(layer, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("training", [True, False])
@torch.no_grad()
def test_no_token_is_dropped(training):
    layer = mixture().train(training)
    served = []
    for expert in layer.experts:
        expert.register_forward_hook(lambda _, inputs, __: served.append(len(inputs[0])))
    layer(torch.randn(4, 101, 12))
    assert sum(served) == 4 * 101 * 2
    assert len(served) == 5


@torch.no_grad()
def test_all_tokens_at_one_expert_are_served_too():
    layer = mixture(experts_per_token=1)
    layer.router.weight.zero_()
    layer.router.weight[3, 0] = 100.0
    x = torch.randn(2, 300, 12)
    x[..., 0] = 1
    out, balance = layer(x)
    torch.testing.assert_close(
        out.view(-1, 12), layer.experts[3](x.view(-1, 12)), rtol=0.0, atol=0.0
    )
    assert balance == 0  # nothing to balance outside training
    assert layer.train()(x)[1] == pytest.approx(5.0)


@torch.no_grad()
def test_an_even_load_has_the_loss_one():
    layer = mixture(d_model=5, experts_per_token=1).train()
    layer.router.weight.copy_(30 * torch.eye(5))
    x = torch.eye(5).repeat(4, 1)[None]
    _, balance = layer(x)
    assert balance == pytest.approx(1.0)
    layer.router.weight.zero_()
    assert layer(x)[1] == pytest.approx(1.0)  # even probabilities


@torch.no_grad()
def test_the_loss_by_hand():
    layer = mixture().train()
    x = torch.randn(3, 40, 12)
    probabilities = layer.router(x.view(-1, 12)).softmax(-1)
    chosen = probabilities.argsort(descending=True)[:, :2]
    share = torch.stack([(chosen == e).sum() for e in range(5)]) / 240
    expected = 5 * (share * probabilities.mean(0)).sum()
    assert layer(x)[1].item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_loss_pulls_the_load_apart():
    """Its gradient lowers the probability of the expert that has more than its share."""
    layer = mixture(experts_per_token=1).train()
    with torch.no_grad():
        layer.router.weight.zero_()
        layer.router.weight[2, 0] = 1.0
    x = torch.randn(1, 50, 12)
    x[..., 0] = 1
    layer(x)[1].backward()
    assert layer.router.weight.grad[2, 0] > 0


def test_gradients_reach_the_router_and_every_expert_that_served():
    layer = mixture().train()
    x = torch.randn(4, 30, 12, requires_grad=True)
    layer(x)[0].square().sum().backward()
    assert x.grad is not None
    assert (x.grad.abs().sum(-1) > 0).all()
    assert all(parameter.grad.any() for parameter in layer.parameters())


@torch.no_grad()
def test_experts_of_autocast_are_weighed_in_their_own_dtype():
    layer, x = mixture(), torch.randn(2, 9, 12)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x)[0].dtype == layer.experts[0](x[0]).dtype == torch.bfloat16


@torch.no_grad()
def test_one_token_is_served_as_among_many():
    layer = mixture()
    x = torch.randn(1, 9, 12)
    whole = layer(x)[0]
    for i in range(9):
        torch.testing.assert_close(layer(x[:, i : i + 1])[0], whole[:, i : i + 1])


@pytest.mark.parametrize("rows", [1, 2, 3, 127, 128, 129, 300])
@torch.no_grad()
def test_a_float_row_does_not_depend_on_how_many_there_are(rows):
    expert = mixture(d_model=64, expert_size=96).experts[0]
    x = torch.randn(300, 64)
    assert torch.equal(expert(x[:rows]), expert(x)[:rows])


@pytest.mark.parametrize("mode", ["ptq_int8", "ptq_int4", "mixed_precision"])
@torch.no_grad()
def test_a_row_of_a_quantized_expert_does_not_either(build, mode):
    """What is between its products is seen: of the rest, codes hide most of a last bit."""
    expert = build(mode, "quantized").layers[0].experts.experts[0]
    hidden: list[torch.Tensor] = []
    expert.down.register_forward_pre_hook(lambda _, args: hidden.append(args[0]))
    x = 3 * torch.randn(300, 24)
    whole = expert(x)
    for rows in (*range(1, 40), 128, 129, 299):
        assert torch.equal(expert(x[:rows]), whole[:rows]), rows
        assert torch.equal(hidden[-1], hidden[0][:rows]), rows


@pytest.mark.parametrize("rows", [1, 2, 3, 127, 128, 129, 299])
@torch.no_grad()
def test_what_a_token_gets_does_not_depend_on_how_many_there_are(rows):
    layer = mixture(d_model=64, expert_size=96)
    x = torch.randn(1, 300, 64)
    assert torch.equal(layer(x[:, :rows])[0], layer(x)[0][:, :rows])


def skip_the_idle(layer: Any, tokens: torch.Tensor, chosen: torch.Tensor):
    """Serve as outside of training: experts without tokens are not called."""
    order = chosen.flatten().argsort(stable=True)
    batches = tokens[order // layer.experts_per_token].split(layer._load_of(chosen).tolist())
    pairs = zip(layer.experts, batches, strict=True)
    served = torch.cat([expert(batch) for expert, batch in pairs if len(batch)])
    return served[order.argsort()].view(*chosen.shape, -1)


@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_idle_experts_have_gradients_of_zero_and_change_no_other(tokens, monkeypatch):
    """So that processes wait for no gradient; weights of idle experts decay as all others do."""
    x = torch.randn(1, tokens, 12)
    layers = [mixture(experts_per_token=1).train() for _ in range(2)]
    layers[1].load_state_dict(layers[0].state_dict())
    for layer in layers:
        with torch.no_grad():
            layer.router.weight[3] = -layer.router.weight[1]
            layer.router.weight[4] = 0.0
    outs = [layers[0](x)[0]]
    monkeypatch.setattr(MixtureOfExperts, "_serve", skip_the_idle)
    outs.append(layers[1](x)[0])
    assert torch.equal(*outs)
    before = copy.deepcopy(layers[0].state_dict())
    for layer, out in zip(layers, outs, strict=True):
        out.square().sum().backward()
        torch.optim.AdamW(layer.parameters(), lr=0.1, weight_decay=0.5).step()
    idle = 0
    for name, parameter in layers[0].named_parameters():
        other = layers[1].get_parameter(name)
        assert parameter.grad is not None
        if other.grad is None and "experts" in name:
            idle += 1
            assert not parameter.grad.any()
            torch.testing.assert_close(parameter, before[name] * (1 - 0.1 * 0.5))
        elif other.grad is not None:
            assert torch.equal(parameter.grad, other.grad)
            assert torch.equal(parameter, other)
    assert idle >= 2


def test_data_parallel_processes_share_their_load(tmp_path):
    """The mean of the losses and gradients of two processes is that of one with the whole batch."""
    code = """
import sys, torch, torch.distributed as dist
from bkcore.model import ResNetBKConfig
from bkcore.model.moe import MixtureOfExperts
from bkcore.processes import leave

rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
torch.manual_seed(0)
layer = MixtureOfExperts(ResNetBKConfig(d_model=12, num_experts=5, expert_size=20)).train()
x = torch.randn(2, 30, 12)
_, balance = layer(x[rank][None])
balance.backward()
torch.save([balance.detach(), layer.router.weight.grad], f"{folder}/{rank}")
dist.barrier()  # a process that leaves early tears the connection down for the other
leave(0)
"""
    runs = [
        subprocess.Popen([sys.executable, "-c", code, str(rank), str(tmp_path)])
        for rank in range(2)
    ]
    assert [run.wait(timeout=120) for run in runs] == [0, 0]
    found = [torch.load(tmp_path / str(rank), weights_only=True) for rank in range(2)]
    torch.manual_seed(0)
    layer = mixture(expert_size=20).train()
    x = torch.randn(2, 30, 12)
    _, balance = layer(x)
    balance.backward()
    torch.testing.assert_close((found[0][0] + found[1][0]) / 2, balance.detach())
    grad = (found[0][1] + found[1][1]) / 2
    torch.testing.assert_close(grad, layer.router.weight.grad, rtol=1e-4, atol=1e-6)
    _, alone = layer(x[:1])
    assert abs(found[0][0] - alone) > 1e-3, "its own load alone would have done"


# ---- load ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "form", [(None, "float"), ("qat_int4", "training"), ("ptq_int8", "quantized")]
)
@torch.no_grad()
def test_the_load_counts_the_tokens_that_each_expert_serves(build, tokens, form):
    model = build(*form)
    served: dict[Expert, int] = {}

    def serve(expert: Expert, inputs: tuple[torch.Tensor]) -> None:
        served[expert] = served.get(expert, 0) + len(inputs[0])

    for expert in (module for module in model.modules() if isinstance(module, Expert)):
        expert.register_forward_pre_hook(serve)
    batches = [tokens(3, 50), tokens(1, 7)]
    with counting_load(model) as load:
        for batch in batches:
            model(batch)
    counts = [[served.get(e, 0) for e in layer.experts.experts] for layer in model.layers]
    assert [layer.tolist() for layer in load] == counts
    assert all(sum(layer) == (150 + 7) * 2 for layer in counts)
    model(batches[0])
    assert [layer.tolist() for layer in load] == counts, "counted after the block"


# ---- one expert: a plain perceptron --------------------------------------------------------


def test_one_expert_has_no_router(build, tokens):
    sparse = build(num_experts=4, experts_per_token=2, expert_size=40)
    twin = build(num_experts=1, experts_per_token=1, expert_size=80)
    layer = twin.layers[0].experts
    assert [name for name, _ in layer.named_parameters()] == [
        "experts.0.up.weight",
        "experts.0.down.weight",
    ]
    active = sum(p.numel() for e in sparse.layers[0].experts.experts[:2] for p in e.parameters())
    assert sum(p.numel() for p in layer.parameters()) == active
    x = torch.randn(2, 7, 24)
    up, down = layer.experts[0].up.weight, layer.experts[0].down.weight
    out, balance = layer(x)
    assert torch.equal(out, F.linear(F.silu(F.linear(x, up)), down))
    assert balance == 0
    ids = tokens(2, 9)
    assert torch.equal(
        twin.train()(ids, labels=ids).loss, twin.eval()(ids, labels=ids, return_logits=False).loss
    )
    with counting_load(twin) as load:
        twin(ids)
    assert load == []


@torch.no_grad()
def test_one_expert_is_causal_and_quantized_in_every_mode(build, tokens, executed_form):
    model, ids = build(*executed_form, num_experts=1, experts_per_token=1), tokens(2, 60)
    is_float = executed_form[0] is None
    assert isinstance(model.layers[0].experts.experts[0].up, torch.nn.Linear) is is_float
    logits = model(ids).logits
    for position in (1, 30, 59):
        changed = ids.clone()
        changed[0, position] = (changed[0, position] + 1) % 61
        other = model(changed).logits
        assert torch.equal(other[0, :position], logits[0, :position])
        assert torch.equal(other[1], logits[1])
        assert not torch.equal(other[0, position], logits[0, position])


def test_one_expert_is_saved_and_trained(build, tokens, tmp_path):
    model = build("ptq_int4", "quantized", num_experts=1, experts_per_token=1)
    ids = tokens(2, 20)
    model.save_pretrained(tmp_path)
    again = ResNetBKForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(again(ids).logits, model(ids).logits)
    trained = build("qat_int4", "training", num_experts=1, experts_per_token=1).train()
    trained(ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in trained.layers[0].experts.parameters())


@pytest.mark.parametrize("rows", [0, 1, 64, 65, 130])
def test_an_expert_trains_on_whole_blocks_of_rows(rows):
    """Few shapes, for the kernels that are made for each; what is filled up leaves no trace."""
    torch.manual_seed(0)
    expert: Any = Expert(ResNetBKConfig(vocab_size=10, d_model=8, expert_size=12)).train()
    seen = []
    expert.up.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    x = torch.randn(rows, 8, requires_grad=True)
    out = expert(x)
    assert seen == [64 * math.ceil(rows / 64)]
    torch.testing.assert_close(out, expert.perceptron(x))
    out.square().sum().backward()
    found = [x.grad, expert.up.weight.grad, expert.down.weight.grad]
    loss = expert.perceptron(x).square().sum()
    expected = torch.autograd.grad(loss, [x, expert.up.weight, expert.down.weight])
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
