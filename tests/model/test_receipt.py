"""The receipt says what was done, and weights can have bits of their own."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bkcore.errors import CalibrationError, CheckpointError, InputError, LifecycleError
from bkcore.evaluation import sensitivity
from bkcore.model import ResNetBKForCausalLM, conversion, core_certificates, receipt
from bkcore.model.config import ResNetBKConfig
from bkcore.model.moe import Expert, counting_load
from bkcore.quantization import QuantizationConfig, linear, receipt_file
from bkcore.quantization.lifecycle import QuantizationState
from bkcore.quantization.packing import unpack_int4
from bkcore.quantization.weights import HalfWeight, PackedWeight

MIXED = {
    "embedding": 4,
    "layers.0.mixer.in_proj": 16,
    "layers.0.experts.experts.0.up": 16,
    "layers.0.experts.experts.0.down": 16,
    "layers.1.experts.experts.2.up": 16,
    "layers.1.experts.experts.3.down": 8,
}


def mixed(build, state="quantized", **options):
    """A model with weights of all widths."""
    model = build(**options)
    model.configure_quantization(
        QuantizationConfig("mixed_precision", 16, tensor_bits=MIXED, min_size=0)
    )
    if state == "quantized":
        model.calibrate_quantization([torch.randint(61, (4, 32)) for _ in range(3)])
    return model


def test_errors_and_clipping_are_those_of_the_weights(build, mode):
    before = {slot.name: slot.layer.weight for slot in conversion.quantizable(build())}
    model = build(mode, "training" if mode.startswith("qat") else "calibrated")
    if mode.startswith("qat"):
        before = {slot.name: slot.layer.weight.weight for slot in conversion.quantizable(model)}
        model.convert()
    else:
        model.apply_ptq()
    layers = {slot.name: slot.layer for slot in conversion.quantizable(model)}
    assert [entry["name"] for entry in model.receipt["weights"]] == list(layers)
    for entry in model.receipt["weights"]:
        weight, float_weight = layers[entry["name"]].weight, before[entry["name"]].detach()
        values = weight.rows(torch.arange(len(float_weight)))
        error = (values - float_weight).norm() / float_weight.norm()
        assert entry["relative_error"] == pytest.approx(error.item(), rel=1e-4)
        assert entry["shape"] == list(float_weight.shape)
        assert (
            entry.get("rounding")
            == {
                16: None,
                8: "nearest",
                4: "nearest" if mode.startswith("qat") or entry["part"] == "head" else "gptq",
            }[entry["bits"]]
        )
        if entry["bits"] == 16 or entry["rounding"] == "gptq":
            continue
        largest = 127 * weight.scales().amax(1, keepdim=True)
        beyond = (float_weight.abs() > 1.2 * largest).double().mean().item()
        assert beyond <= entry["clipping_rate"] < 0.2
        saturated = (weight.codes() == 127) | (
            weight.codes() == (-128 if weight.bits == 8 else -127)
        )
        assert entry["levels"] == ("even" if weight.bits == 8 else "companded")
        assert entry["clipping_rate"] <= saturated.double().mean().item()


def test_clipping_is_counted():
    layer = linear.QuantizedLinear(PackedWeight((1, 4), 8, 4))
    slot = conversion.Slot(torch.nn.Sequential(layer), "0", "core", "layer")
    weight = torch.tensor([[127.4, 127.6, -128.4, -128.6]])  # the scale is 1
    entry = receipt._weight_entry(slot, weight, QuantizationConfig())
    assert entry["clipping_rate"] == 0.5


def test_tokens_are_counted_per_expert_and_quantizer(build, tokens):
    model = build()
    model.configure_quantization("ptq_int8")
    batches = [tokens(2, 20), tokens(3, 10)]
    with counting_load(model) as load:
        model(batches[0])
        model.calibrate_quantization(batches)
    # Calibration counts by itself, and takes nothing from the count around it.
    assert [layer.sum().item() for layer in load] == [2 * (40 + 70)] * 2
    twin = build()
    with counting_load(twin) as expected:
        for batch in batches:
            twin(batch)
    seen = {entry["name"]: entry["calibration_tokens"] for entry in model.receipt["weights"]}
    for number, layer in enumerate(expected):
        for expert, count in enumerate(layer.tolist()):
            assert seen[f"layers.{number}.experts.experts.{expert}.down"] == count
    assert seen["embedding"] == seen["layers.1.mixer.out_proj"] == 70
    assert {entry["calibration_tokens"] for entry in model.receipt["activations"]} == {70}
    assert len(model.receipt["activations"]) == 7 * 2
    assert {entry["range_method"] for entry in model.receipt["activations"]} == {"mse"}
    assert all(0 <= entry["clipping_rate"] < 0.1 for entry in model.receipt["activations"])
    assert all(layer.experts.calibration_load is None for layer in model.layers)


def test_a_count_inside_a_count_counts_for_both(build, tokens):
    model = build()
    with counting_load(model) as outer:
        model(tokens(1, 10))
        with counting_load(model) as inner:
            model(tokens(1, 5))
        model(tokens(1, 3))
    assert inner[0].sum() == 2 * 5
    assert outer[0].sum() == 2 * 18


def test_the_errors_of_the_cores_are_those_of_their_certificates(build, tokens, mode):
    model = build()
    model.train().configure_quantization(mode)
    sample = tokens(2, 150)
    model.calibrate_quantization([tokens(2, 20), sample])
    if model.quantization_state is QuantizationState.TRAINING:
        model.convert()
    assert model.training
    certificates = core_certificates(model.eval(), sample[:1, :128])
    assert len(model.receipt["cores"]) == len(certificates) == 2
    for entry, certificate in zip(model.receipt["cores"], certificates, strict=True):
        assert entry["tokens"] == 128
        assert entry["error"] == float(certificate.error.mean())
        assert 0 < entry["error"] < entry["bound"] == float(certificate.bound.mean())
        assert 0 < entry["worst"] <= 1
        assert entry["clipped"] == certificate.clipped


def test_a_single_expert_sees_every_token(build, tokens):
    model = build(num_experts=1, experts_per_token=1)
    model.configure_quantization(QuantizationConfig("ptq_int8", min_size=0))
    model.calibrate_quantization([tokens(2, 20)])
    assert receipt.problems(model.receipt) == []
    assert {entry["calibration_tokens"] for entry in model.receipt["weights"]} == {40}


def test_the_kernel_is_what_runs(build, monkeypatch):
    model = mixed(build)
    kernels = {entry["name"]: entry["kernel"] for entry in model.receipt["weights"]}
    for name, kernel in kernels.items():
        half = "bkcore::dense_product"
        assert kernel == (half if MIXED.get(name) == 16 else "bkcore::product")
    assert receipt.problems(model.receipt) == []

    def in_float(x, weight, scales, group_size, bits):
        codes = weight if bits == 8 else unpack_int4(weight, x.shape[-1])
        return x @ (codes * scales.float().repeat_interleave(group_size, 1)[:, : x.shape[-1]]).t()

    monkeypatch.setattr(linear, "product", in_float)
    found = receipt.problems(mixed(build).receipt)
    assert len(found) == len(kernels) - list(MIXED.values()).count(16)
    assert all("is multiplied in float (aten::mm)" in problem for problem in found)


def test_every_tensor_has_an_entry_and_every_float_one_a_reason(build, mode):
    model = build(mode, "quantized")
    entries = [*model.receipt["weights"], *model.receipt["activations"], *model.receipt["float"]]
    assert sum(entry["bytes"] for entry in entries) == conversion.storage_bytes(model)
    assert receipt.problems(model.receipt) == []
    routers = [entry for entry in model.receipt["float"] if "router" in entry["name"]]
    assert len(routers) == 2
    assert all("decides which experts serve" in entry["reason"] for entry in routers)


def test_what_stays_float_is_a_problem(build, monkeypatch):
    everything = conversion.quantizable

    def but_one(model):
        return (slot for slot in everything(model) if slot.name != "layers.1.mixer.in_proj")

    monkeypatch.setattr(conversion, "quantizable", but_one)
    model = build()
    model.configure_quantization(QuantizationConfig("ptq_int8", min_size=0))
    model.calibrate_quantization([torch.randint(61, (2, 20))])
    found = receipt.problems(model.receipt)
    assert found == ["layers.1.mixer.in_proj.weight stayed float, which no mode intends"]


def test_the_wrong_bits_are_a_problem(build):
    model = build("ptq_int8", "quantized")
    model.receipt["weights"][3]["bits"] = 32
    name = model.receipt["weights"][3]["name"]
    assert receipt.problems(model.receipt) == [f"{name} has 32 bits instead of 8"]


def test_it_is_saved_and_loaded_at_every_step(build, tmp_path):
    model = build("ptq_int8", "calibrated")
    model.save_pretrained(tmp_path / "calibrated")
    later = ResNetBKForCausalLM.from_pretrained(tmp_path / "calibrated")
    with pytest.raises(CheckpointError, match="has no receipt"):
        receipt_file.read(tmp_path / "calibrated")
    model.apply_ptq()
    later.apply_ptq()
    assert later.receipt == model.receipt
    later.save_pretrained(tmp_path / "quantized")
    assert receipt_file.read(tmp_path / "quantized") == model.receipt
    again = ResNetBKForCausalLM.from_pretrained(tmp_path / "quantized")
    assert again.receipt == model.receipt


def test_a_float_model_saved_over_a_quantized_one_has_no_receipt(build, tmp_path):
    build("ptq_int8", "quantized").save_pretrained(tmp_path)
    build().save_pretrained(tmp_path)
    assert ResNetBKForCausalLM.from_pretrained(tmp_path).receipt is None


@torch.no_grad()
def test_bits_of_single_weights_are_saved_with_the_model(build, tokens, tmp_path):
    model = mixed(build)
    for slot in conversion.quantizable(model):
        expected = MIXED.get(slot.name, {"expert": 4, "core": 8, "head": 16}[slot.part])
        kind = HalfWeight if expected == 16 else PackedWeight
        assert type(slot.layer.weight) is kind
        assert getattr(slot.layer.weight, "bits", 16) == expected
    ids = tokens(2, 30)
    model.save_pretrained(tmp_path)
    loaded = ResNetBKForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    size = loaded.estimate_model_size()
    assert size["quantized_bytes"] == size["current_bytes"]


@pytest.mark.parametrize("mode", ["ptq_int8", "ptq_int4", "mixed_precision"])
def test_small_weights_stay_in_float16_unless_they_are_named(build, tokens, tmp_path, mode):
    """The experts' have 960 numbers, the output projections' 576, the embedding 1,464."""
    named = "layers.0.experts.experts.1.up"
    model = build()
    model.configure_quantization(
        QuantizationConfig(mode, 16, min_size=960, tensor_bits={"layers.0.mixer.out_proj": 8})
    )
    model.calibrate_quantization([tokens(4, 32)])
    kinds = {slot.name: type(slot.layer.weight) for slot in conversion.quantizable(model)}
    assert kinds[named] is PackedWeight  # no fewer than 960
    assert kinds["layers.0.mixer.out_proj"] is PackedWeight
    assert kinds["layers.1.mixer.out_proj"] is HalfWeight
    entries = {entry["name"]: entry for entry in model.receipt["weights"]}
    small = [name for name, entry in entries.items() if "reason" in entry]
    assert small == ["layers.1.mixer.out_proj"]
    entry = entries[small[0]]
    assert (entry["bits"], entry["scheme"], entry["kernel"]) == (
        *(16, "float16", "bkcore::dense_product"),
    )
    assert entry["reason"] == "small: fewer numbers than min_size, 960"
    [problem] = receipt.problems(model.receipt)
    assert problem.startswith("layers.1.mixer.out_proj stayed float16 (small")
    assert "--min-size 0" in problem
    ids = tokens(2, 30)
    model.save_pretrained(tmp_path)
    loaded = ResNetBKForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    size = loaded.estimate_model_size()
    assert size["quantized_bytes"] == size["current_bytes"]


def test_the_default_is_where_codes_stop_to_pay(build, tokens):
    model = build()
    model.configure_quantization("ptq_int8")
    model.calibrate_quantization([tokens(4, 32)])
    for slot in conversion.quantizable(model):
        kind = HalfWeight if slot.size < 2048 else PackedWeight
        assert type(slot.layer.weight) is kind
    trained = build()
    trained.configure_quantization("qat_int8")
    trained.calibrate_quantization([tokens(4, 32)])
    trained.convert()
    kinds = {type(slot.layer.weight) for slot in conversion.quantizable(trained)}
    assert kinds == {PackedWeight}


def test_a_checkpoint_of_a_version_without_the_rule_has_codes(build, tokens, tmp_path):
    model = build("ptq_int8", "quantized")
    del model.config.quantization["min_size"]
    model.save_pretrained(tmp_path)
    ids = tokens(2, 30)
    assert torch.equal(ResNetBKForCausalLM.from_pretrained(tmp_path)(ids).logits, model(ids).logits)


@pytest.mark.parametrize("rows", [1, 2, 3, 127, 129, 300])
@torch.no_grad()
def test_a_row_of_a_float16_expert_does_not_depend_on_how_many_there_are(rows):
    expert = Expert(ResNetBKConfig(d_model=64, expert_size=96)).eval()
    for name in ("up", "down"):
        weight = HalfWeight.from_float(getattr(expert, name).weight)
        setattr(expert, name, linear.QuantizedLinear(weight))
    x = torch.randn(300, 64)
    assert torch.equal(expert(x[:rows]), expert(x)[:rows])


def test_bits_that_cannot_be_are_refused(build):
    with pytest.raises(InputError, match=r"takes \(4, 8, 16\)"):
        QuantizationConfig("mixed_precision", tensor_bits={"embedding": 5})
    with pytest.raises(InputError, match=r"takes \(4, 8\)"):
        QuantizationConfig("qat_int8", tensor_bits={"embedding": 16})
    with pytest.raises(InputError, match="must be a dictionary"):
        QuantizationConfig("ptq_int8", tensor_bits=[8])  # type: ignore[arg-type]
    model = build()
    with pytest.raises(LifecycleError, match="needs a quantization mode"):
        model.assign_bits({"embedding": 8})
    with pytest.raises(InputError, match="no quantizable weight of that name"):
        model.configure_quantization(QuantizationConfig(tensor_bits={"layers.7.up": 8}))
    quantized_model = build("ptq_int8", "quantized")
    with pytest.raises(LifecycleError, match="assign_bits"):
        quantized_model.assign_bits({"embedding": 4})


def test_bits_are_changed_after_calibration_if_it_was_for_int4(build, tokens, tmp_path):
    model = build()
    every = {slot.name: 4 for slot in conversion.quantizable(model)}
    model.configure_quantization(QuantizationConfig("mixed_precision", 16, tensor_bits=every))
    model.start_calibration()
    model(tokens(4, 32))
    model.end_calibration()
    some = every | {"layers.0.mixer.in_proj": 8, "layers.1.experts.experts.0.up": 16}
    model.assign_bits(some)
    model.save_pretrained(tmp_path)
    loaded = ResNetBKForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(CalibrationError, match=r"layers\.0\.mixer\.in_proj was not calibrated"):
        model.assign_bits(every)
    for each in (model, loaded):
        each.apply_ptq()
    assert {entry["name"]: entry["bits"] for entry in model.receipt["weights"]} == some
    ids = tokens(1, 10)
    assert torch.equal(model(ids).logits, loaded(ids).logits)


def test_sensitivity_is_of_the_unit_alone_and_leaves_the_model_as_it_was(build, tokens):
    model, twin = build(), build()
    ids = tokens(2, 20)
    config = QuantizationConfig("mixed_precision", 16, weight_rounding="nearest")
    found = sensitivity.measure(model, config, [ids[:1], ids[1:]])
    assert torch.equal(model(ids).logits, twin(ids).logits)
    assert len(found) == 2 * (1 + 2 * (2 + 4))
    unit = found[-2]
    names = sensitivity.units(model)[unit.unit]
    alone = replace(config, tensor_bits=dict.fromkeys(names, 4))
    with conversion.packed_alone(model, alone, names):
        log_q = model(ids).logits.double().log_softmax(-1)[:, :-1]
    log_p = model(ids).logits.double().log_softmax(-1)[:, :-1]
    divergence = (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()
    change = (log_p - log_q).gather(-1, ids[:, 1:, None]).mean().item()
    assert unit.bits == 4
    assert unit.divergence == pytest.approx(divergence, rel=1e-3)
    assert unit.loss_change == pytest.approx(change, rel=1e-3, abs=1e-7)
    by_bits = {bits: [e.divergence for e in found if e.bits == bits] for bits in (4, 8)}
    assert sum(by_bits[4]) > 10 * sum(by_bits[8]) > 0
