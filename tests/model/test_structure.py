"""What stands between a model and its layers is not lost in silence when they are replaced."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.data import DataLoader

from bkcore.errors import LifecycleError
from bkcore.model import ResNetBKForCausalLM, quantized
from bkcore.quantization import QuantizationConfig


class Adapter(nn.Module):
    """A layer and what is added to its outputs, as adapters do it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base
        self.change = nn.Linear(base.in_features, base.out_features, bias=False)

    @property
    def weight(self) -> torch.Tensor:
        return self.base_layer.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base_layer(x) + self.change(x)


class OtherLinear(nn.Linear):
    pass


class Doubled(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 2 * weight


class OtherTensor(torch.Tensor):
    pass


def adapter(model):
    model.layers[0].mixer.in_proj = Adapter(model.layers[0].mixer.in_proj)


def router_adapter(model):
    model.layers[1].experts.router = Adapter(model.layers[1].experts.router)


def subclass(model):
    expert = model.layers[0].experts.experts[1]
    expert.up = OtherLinear(expert.up.in_features, expert.up.out_features, bias=False)


def bias(model):
    layer = model.layers[0].mixer.out_proj
    layer.bias = nn.Parameter(torch.zeros(layer.out_features))


def weight_norm(model):
    with pytest.warns(FutureWarning):
        torch.nn.utils.weight_norm(model.layers[0].mixer.in_proj)


def wrapped_embedding(model):
    model.embedding = nn.Sequential(model.embedding)


def other_embedding(model):
    model.embedding = nn.Embedding(*model.embedding.weight.shape)


def shared_weight(model):
    model.layers[1].mixer.in_proj.weight = model.layers[0].mixer.in_proj.weight


def shared_module(model):
    model.layers[1].experts = model.layers[0].experts


def tensor_subclass(model):
    weight = model.layers[0].mixer.in_proj.weight
    model.layers[0].mixer.in_proj.weight = nn.Parameter(weight.detach().as_subclass(OtherTensor))


def fake_quantization(model):
    layer = model.layers[0].mixer.in_proj
    layer.qconfig = torch.ao.quantization.get_default_qat_qconfig("fbgemm")
    model.layers[0].mixer.in_proj = torch.ao.nn.qat.Linear.from_float(layer)


def own_forward(model):
    layer = model.layers[0].mixer.in_proj
    layer.forward = lambda x: 2 * nn.Linear.forward(layer, x)


def hook(kind):
    def register(model):
        getattr(model.layers[0].experts.experts[0].down, kind)(lambda *_: None)

    return register


BETWEEN = {
    "adapter": (adapter, r"layers\.0\.mixer\.in_proj is a \S+\.Adapter, not a Linear"),
    "router adapter": (router_adapter, r"experts\.router is a \S+\.Adapter"),
    "subclass": (subclass, "OtherLinear, not a Linear"),
    "bias": (bias, r"bias of layers\.0\.mixer\.out_proj was added"),
    "parametrization": (
        lambda m: parametrize.register_parametrization(
            m.layers[0].mixer.in_proj, "weight", Doubled()
        ),
        "ParametrizedLinear",
    ),
    "weight norm": (
        lambda m: parametrizations.weight_norm(m.layers[0].mixer.in_proj),
        "ParametrizedLinear",
    ),
    "old weight norm": (weight_norm, r"layers\.0\.mixer\.in_proj was"),
    "spectral norm": (
        lambda m: torch.nn.utils.spectral_norm(m.layers[0].mixer.in_proj),
        r"in_proj was",
    ),
    "pruning": (
        lambda m: prune.l1_unstructured(m.layers[0].experts.experts[0].up, "weight", 0.5),
        r"experts\.0\.up was",
    ),
    "wrapped embedding": (wrapped_embedding, "embedding is a Sequential"),
    "other embedding": (other_embedding, "embedding is a Embedding, not a TokenEmbedding"),
    "shared weight": (shared_weight, r"is shared with layers\.0\.mixer\.in_proj\.weight"),
    "shared module": (shared_module, "is shared with"),
    "tensor subclass": (tensor_subclass, r"weight of layers\.0\.mixer\.in_proj is a"),
    "fake quantization": (fake_quantization, r"in_proj is a torch\.ao\.\S+\.Linear, not a Linear"),
    "forward": (own_forward, r"forward\(\) of its own"),
    "meta": (lambda m: m.layers[0].mixer.in_proj.to("meta"), "meta device"),
    "compiled": (lambda m: m.layers[0].compile(backend="eager"), "is compiled"),
    "compiled module": (
        lambda m: m.layers.__setitem__(0, torch.compile(m.layers[0], backend="eager")),
        "OptimizedModule",
    ),
    "cut embedding": (
        lambda m: setattr(m.embedding, "weight", nn.Parameter(m.embedding.weight[:50].detach())),
        r"is \(50, 24\), not \(61, 24\)",
    ),
}
BETWEEN |= {
    kind: (hook(kind), r"experts\.0\.down has hooks")
    for kind in (
        "register_forward_hook",
        "register_forward_pre_hook",
        "register_full_backward_hook",
        "register_full_backward_pre_hook",
    )
}


@pytest.mark.parametrize("between", BETWEEN)
def test_it_is_refused_at_every_step(build, tokens, between):
    change, message = BETWEEN[between]
    steps = {
        None: [lambda m: m.configure_quantization("ptq_int8")],
        ("ptq_int4", "float"): [
            lambda m: m.start_calibration(),
            lambda m: m.calibrate_quantization([tokens(1, 8)]),
            lambda m: m.assign_bits({"embedding": 8}),
        ],
        ("ptq_int4", "calibrated"): [lambda m: m.apply_ptq(), lambda m: m.start_calibration()],
        ("qat_int8", "calibrated"): [lambda m: m.enable_qat()],
    }
    for form, calls in steps.items():
        model = build(*(form or ()))
        change(model)
        state, modules = model.quantization_state, list(model.modules())
        for call in calls:
            with pytest.raises(LifecycleError, match=message) as refused:
                call(model)
            assert "merge_and_unload()" in str(refused.value)
            assert model.quantization_state is state
            assert all(x is y for x, y in zip(model.modules(), modules, strict=True))


def test_it_is_refused_in_the_middle_of_calibration_too(build, tokens):
    for between in ("adapter", "register_forward_hook", "bias"):
        model = build("ptq_int4")
        model.start_calibration()
        model(tokens(1, 8))
        BETWEEN[between][0](model)
        with pytest.raises(LifecycleError, match=BETWEEN[between][1]):
            model.end_calibration()


def test_it_is_refused_before_codes_are_frozen(build):
    model = build("qat_int8", "training")
    model.layers[0].mixer.in_proj.register_forward_hook(lambda *_: None)
    with pytest.raises(LifecycleError, match="in_proj has hooks"):
        model.convert()
    model = build("qat_int8", "training")
    weight = model.layers[0].mixer.in_proj.weight
    parametrize.register_parametrization(weight, "weight", Doubled())
    with pytest.raises(LifecycleError, match="ParametrizedTrainableWeight"):
        model.convert()


def test_what_stays_with_the_model_may_stay(build, tokens):
    """Hooks of modules that are not replaced, and models that were cast, copied or subclassed."""

    class Subclass(ResNetBKForCausalLM):
        def __init__(self, config):
            super().__init__(config)
            self.extra = nn.Linear(2, 2)

    seen = []
    models = [build(), copy.deepcopy(build()), build().double(), Subclass(build().config)]
    for model in models:
        model.layers[0].mixer.register_forward_hook(lambda *_: seen.append(1))
        model.embedding.requires_grad_(False)
        model.configure_quantization(QuantizationConfig("ptq_int4", 16))
        model.calibrate_quantization(DataLoader(tokens(4, 8), batch_size=2))
        before = len(seen)
        model(tokens(1, 8))
        assert len(seen) == before + 1


def test_removing_it_is_enough(build, tokens):
    model = build("ptq_int8")
    parametrizations.weight_norm(model.layers[0].mixer.in_proj)
    handle = model.embedding.register_forward_hook(lambda *_: None)
    with pytest.raises(LifecycleError):
        model.start_calibration()
    parametrize.remove_parametrizations(model.layers[0].mixer.in_proj, "weight")
    with pytest.raises(LifecycleError, match="embedding has hooks"):
        model.start_calibration()
    handle.remove()
    model.calibrate_quantization([tokens(1, 8)])
    assert len(list(quantized.quantizable(model))) == 21


def test_adapters_of_peft_are_refused_and_merged_ones_taken(build, tokens):
    peft = pytest.importorskip("peft")
    model = build("ptq_int8")
    options = {"target_modules": ["in_proj", "up"], "init_lora_weights": False}
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **options))
    ids = tokens(2, 9)
    with pytest.raises(LifecycleError, match=r"is a peft\.\S+\.Linear, not a Linear"):
        model.calibrate_quantization([ids])
    expected = adapted(input_ids=ids).logits
    merged = adapted.merge_and_unload()
    assert merged is model
    torch.testing.assert_close(model(ids).logits, expected)
    model.calibrate_quantization([ids])
