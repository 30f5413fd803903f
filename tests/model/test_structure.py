"""What stands between a model and its layers is not lost in silence when they are replaced."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.data import DataLoader

from bkcore.errors import LifecycleError
from bkcore.model import ResNetBKForCausalLM, conversion
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
        ("ptq_int4", "float"): [
            lambda m: m.start_calibration(),
            lambda m: m.calibrate_quantization([tokens(1, 8)]),
        ],
        ("ptq_int4", "calibrated"): [lambda m: m.apply_ptq(), lambda m: m.start_calibration()],
        ("qat_int8", "calibrated"): [lambda m: m.enable_qat()],
    }
    for form, calls in steps.items():
        model = build(*form)
        change(model)
        state, modules = model.quantization_state, list(model.modules())
        for call in calls:
            with pytest.raises(LifecycleError, match=message) as refused:
                call(model)
            assert "merge_and_unload()" in str(refused.value)
            assert model.quantization_state is state
            assert all(x is y for x, y in zip(model.modules(), modules, strict=True))


def test_what_is_added_during_calibration_is_refused_behind_it(build, tokens):
    for between in ("adapter", "register_forward_hook", "bias"):
        model = build("ptq_int4")
        model.start_calibration()
        model(tokens(1, 8))
        BETWEEN[between][0](model)
        model.end_calibration()
        with pytest.raises(LifecycleError, match=BETWEEN[between][1]):
            model.apply_ptq()


@pytest.mark.parametrize("between", ["adapter", "parametrization", "register_forward_hook"])
def test_steps_that_replace_nothing_may_be_watched(build, between):
    for form in [(), ("ptq_int8", "calibrated")]:
        model = build(*form)
        BETWEEN[between][0](model)
        if not form:
            model.configure_quantization("ptq_int8")
        model.assign_bits({"embedding": 8})
        assert model.quant_config.tensor_bits == {"embedding": 8}


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


class Other(ResNetBKForCausalLM):
    """With another constructor, and modules and tensors of its own."""

    def __init__(self, config, extra):
        super().__init__(config)
        self.extra = extra
        self.scale = nn.Parameter(torch.ones(3))


@pytest.mark.parametrize("mode", ["ptq_int8", "qat_int8"])
def test_subclasses_may_be_built_otherwise(build, tokens, mode):
    model = Other(build().config, nn.Sequential(nn.Linear(2, 2)))
    extra, scale = model.extra[0], model.scale
    extra.register_forward_hook(lambda *_: None)
    model.configure_quantization(mode)
    sizes = model.estimate_model_size()
    assert sizes["fp32_bytes"] == sizes["current_bytes"]
    model.calibrate_quantization([tokens(2, 8)])
    if mode == "qat_int8":
        model.convert()
    assert model.quantization_state.value == "quantized"
    assert model.extra[0] is extra
    assert model.scale is scale
    sizes = model.estimate_model_size()
    assert sizes["quantized_bytes"] == sizes["current_bytes"]


def test_layers_of_a_subclass_that_would_be_replaced_are_refused(build, tokens):
    for extra in (copy.deepcopy(build().layers[0]), copy.deepcopy(build().layers[0].mixer)):
        model = Other(build().config, extra)
        model.configure_quantization("ptq_int8")
        with pytest.raises(LifecycleError, match="extra was added to it"):
            model.calibrate_quantization([tokens(2, 8)])
        assert model.extra is extra
    model = Other(build().config, nn.Linear(61, 24))
    model.extra.weight = model.embedding.weight
    model.configure_quantization("ptq_int8")
    with pytest.raises(LifecycleError, match="is shared with"):
        model.calibrate_quantization([tokens(2, 8)])


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
    assert len(list(conversion.quantizable(model))) == 21


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
