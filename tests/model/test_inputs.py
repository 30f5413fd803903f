"""What the forward pass and the calibration take: honoured, or refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import BatchEncoding, DynamicCache

from bkcore.errors import BKCoreError, DTypeError, InputError, LifecycleError, ShapeError
from bkcore.model import conversion
from bkcore.model.inputs import real_tokens
from bkcore.model.moe import counting_load
from bkcore.quantization.gptq import InputMoments
from tests.model.conftest import MODES
from tests.slow import combinations

LENGTHS = (12, 5, 9)


@pytest.fixture
def padded(tokens):
    """Ids (3, 12), and a mask of rows of 12, 5 and 9 tokens."""
    ids = tokens(3, 12)
    mask = torch.stack([(torch.arange(12) < length).long() for length in LENGTHS])
    return ids, mask


def rows(ids, mask):
    return [row[None, : int(real.sum())] for row, real in zip(ids, mask, strict=True)]


# ---- forward -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
@torch.no_grad()
def test_integers_of_any_size_are_ids_and_labels(build, tokens, dtype):
    model, ids = build(), tokens(2, 9)
    expected = model(ids, labels=ids)
    found = model(ids.to(dtype), labels=ids.to(dtype))
    assert torch.equal(found.logits, expected.logits)
    assert torch.equal(found.loss, expected.loss)
    assert torch.equal(model(ids, labels=ids.to(dtype), return_logits=False).loss, found.loss)


WRONG: dict[str, list[Any]] = {
    "input_ids": [[[1, 2]], None, "text", torch.ones(1, 9, dtype=torch.bool), torch.ones(1, 9)],
    "attention_mask": [
        torch.ones(1, 9, dtype=torch.complex64),
        torch.tensor([[0.0] * 8 + [-torch.inf]]),
        torch.tensor([[0.0] * 8 + [torch.finfo(torch.float32).min]]),
        torch.full((1, 9), torch.nan),
        torch.zeros(1, 1, 9, 9, dtype=torch.long),
        torch.full((1, 9), 2),
        torch.arange(9)[None] % 2,
        torch.zeros(1, 9, dtype=torch.long),
        [[1] * 9],
    ],
    "labels": [
        torch.ones(1, 9),
        torch.ones(1, 9, dtype=torch.bool),
        torch.full((1, 9), 61),
        torch.full((1, 9), -1),
        torch.ones(9, dtype=torch.long),
        [[1] * 9],
    ],
    "num_items_in_batch": ["8", 0, -1, True, torch.ones(2), torch.tensor(True)],
    "cache_params": [DynamicCache(), {}, 3],
    "use_cache": ["yes", 1],
    "return_logits": [0, torch.tensor(True)],
    "return_dict": ["no"],
    "position_ids": [torch.arange(9)[None]],
    "inputs_embeds": [torch.zeros(1, 9, 24)],
    "past_key_values": [DynamicCache()],
    "output_hidden_states": [True],
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in WRONG.items() for value in values]
)
def test_a_wrong_argument_is_refused_by_name(build, tokens, name, value):
    arguments = {"input_ids": tokens(1, 9), name: value}
    with pytest.raises(BKCoreError, match=name):
        build()(**arguments)


def test_what_other_models_are_asked_for_may_be_nothing(build, tokens):
    model, ids = build(), tokens(1, 9)
    options = {"inputs_embeds": None, "position_ids": None, "output_attentions": False}
    assert torch.equal(model(ids, **options).logits, model(ids).logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@torch.no_grad()
def test_masks_of_ones_and_zeros_may_be_floats(build, padded, dtype):
    model, (ids, mask) = build(), padded
    labels = ids.masked_fill(mask == 0, -100)
    expected = model(ids, attention_mask=mask, labels=labels)
    found = model(ids, attention_mask=mask.to(dtype), labels=labels)
    assert torch.equal(found.logits, expected.logits)
    assert torch.equal(found.loss, expected.loss)
    assert torch.equal(model(ids, attention_mask=torch.ones(3, 12)).logits, model(ids).logits)
    with pytest.raises(InputError, match="no attention scores that a mask could be added to"):
        model(ids, attention_mask=torch.log(mask.to(dtype)))


@torch.no_grad()
def test_a_mask_is_looked_at_once(build, padded, monkeypatch):
    """Each look at values waits for a GPU; in a graph there is none."""
    looks: list[str] = []

    def counted(name: str) -> Any:
        look = getattr(torch.Tensor, name)

        def counting(x: torch.Tensor) -> Any:
            looks.append(name)
            return look(x)

        return counting

    for name in ("__bool__", "tolist", "item"):
        monkeypatch.setattr(torch.Tensor, name, counted(name))
    ids, mask = padded
    real = real_tokens(mask, ids, ids.masked_fill(mask == 0, -100))
    assert real is not None
    assert torch.equal(real, mask.bool())
    assert real_tokens(torch.ones(3, 12), ids, ids) is None
    assert len(looks) == 2
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    real = real_tokens(mask, ids, ids)
    assert real is not None
    assert torch.equal(real, mask.bool())
    assert len(looks) == 2


@torch.no_grad()
def test_padding_has_no_labels(build, padded):
    model, (ids, mask) = build(), padded
    with pytest.raises(InputError, match="labels must be -100 where attention_mask has padding"):
        model(ids, attention_mask=mask, labels=ids)
    labels = ids.masked_fill(mask == 0, -100)
    loss = model(ids, attention_mask=mask.bool(), labels=labels).loss
    alone = [
        F.cross_entropy(model(row).logits[0, :-1], row[0, 1:], reduction="sum")
        for row in rows(ids, mask)
    ]
    torch.testing.assert_close(loss, sum(alone) / (sum(LENGTHS) - 3))


def test_a_quantized_model_refuses_to_be_trained(build, tokens):
    ids = tokens(2, 9)
    for mode in ("ptq_int8", "mixed_precision"):
        model = build(mode, "quantized").train()
        for options in ({"labels": ids, "num_items_in_batch": 16}, {"num_items_in_batch": 16}):
            with pytest.raises(LifecycleError, match="its weights are codes"):
                model(ids, **options)
            with torch.no_grad():
                model(ids, **options)


@pytest.mark.parametrize("return_logits", [True, False])
def test_a_loss_of_a_quantized_model_may_be_looked_at(build, tokens, return_logits):
    model, ids = build("ptq_int8").train(), tokens(2, 9)
    model.calibrate_quantization([ids])
    assert model.training
    output = model(ids, labels=ids, return_logits=return_logits)
    assert output.loss.isfinite()
    assert output.aux_loss > 0
    # Of codes there would be no whole gradient.
    assert not any(x.requires_grad for x in output.values() if x is not None)
    with pytest.raises(RuntimeError, match="does not require grad"):
        output.loss.backward()
    with torch.no_grad():
        assert torch.equal(model(ids, labels=ids, return_logits=return_logits).loss, output.loss)
    assert model.eval()(ids, labels=ids).loss.isfinite()


# ---- padding and experts -------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@torch.no_grad()
def test_padding_is_not_counted(build, padded, training):
    model, (ids, mask) = build().train(training), padded
    with counting_load(model) as load:
        model(ids, attention_mask=mask)
    with counting_load(model) as expected:
        for row in rows(ids, mask):
            model(row)
    assert all(torch.equal(one, other) for one, other in zip(load, expected, strict=True))
    assert int(load[0].sum()) == 2 * sum(LENGTHS)


def test_padding_has_no_part_in_the_balance(build, tokens):
    """Whatever the padding is, and however much: gradients of the loss stay the same."""
    ids = tokens(1, 12)
    results = []
    for pad, more in ((0, 0), (0, 5), (7, 9)):
        model = build(load_balancing=10.0).double().train()
        wide, mask = F.pad(ids, (0, more), value=pad), F.pad(torch.ones_like(ids), (0, more))
        output = model(wide, attention_mask=mask, labels=wide.masked_fill(mask == 0, -100))
        output.loss.backward()
        results.append([output.aux_loss, *(p.grad for p in model.parameters())])
    for other in results[1:]:
        for one, same in zip(results[0], other, strict=True):
            torch.testing.assert_close(one, same)


# ---- calibration ---------------------------------------------------------------------------


def observed(model):
    """All that calibration gathered and chose."""
    found = {name: x.clone() for name, x in model.state_dict().items()}
    for n, quantizers in enumerate(conversion.core_quantizers(model)):
        for m, part in enumerate(quantizers.parts()):
            found[f"seen {n} {m}"] = torch.tensor(part.values_seen)
    for n, module in enumerate(x for x in model.modules() if isinstance(x, InputMoments)):
        found[f"tokens {n}"] = module.tokens
    return found


@pytest.mark.parametrize("mode", combinations(MODES, quick=["ptq_int4", "qat_int8"]))
@torch.no_grad()
def test_padding_is_not_observed(build, padded, mode):
    """Calibrating on padded rows is calibrating on the rows alone, bit for bit."""
    ids, mask = padded
    batches = [
        {"input_ids": ids, "attention_mask": mask, "labels": ids},
        BatchEncoding({"input_ids": ids, "attention_mask": mask.bool()}),
        BatchEncoding({"input_ids": ids, "token_type_ids": 0 * ids, "attention_mask": mask}),
        {
            "input_ids": ids,
            "attention_mask": mask.float(),
            "position_ids": ids,
            "length": list(LENGTHS),
            "overflow_to_sample_mapping": torch.arange(3),
            "text": ["one", "two", "three"],
        },
    ]
    alone = build(mode)
    alone.calibrate_quantization(rows(ids, mask))
    for batch in batches:
        model = build(mode)
        model.calibrate_quantization([batch])
        expected, found = observed(alone), observed(model)
        assert expected.keys() == found.keys()
        assert all(torch.equal(found[name], x) for name, x in expected.items())
        seen = alone.receipt["calibration"]
        assert model.receipt["calibration"] == seen
        assert seen["embedding"] == sum(LENGTHS)
    by_hand = [build(mode), build(mode)]
    for model in by_hand:
        model.start_calibration()
    by_hand[0](ids, attention_mask=mask)
    for row in rows(ids, mask):
        by_hand[1](row)
    for model in by_hand:
        model.end_calibration()
    expected, found = observed(by_hand[1]), observed(by_hand[0])
    assert all(torch.equal(found[name], x) for name, x in expected.items())


@torch.no_grad()
def test_a_receipt_is_certified_on_tokens_only(build, padded):
    ids, mask = (x.flip(0) for x in padded)
    model = build("ptq_int8")
    model.calibrate_quantization([{"input_ids": ids, "attention_mask": mask}])
    assert torch.equal(model._certified_ids, ids[:1, : LENGTHS[-1]])
    assert {core["tokens"] for core in model.receipt["cores"]} == {LENGTHS[-1]}


@torch.no_grad()
def test_a_mask_of_ones_observes_what_no_mask_does(build, tokens):
    ids, models = tokens(3, 12), [build("ptq_int4"), build("ptq_int4")]
    models[0].calibrate_quantization([ids])
    models[1].calibrate_quantization([{"input_ids": ids, "attention_mask": torch.ones_like(ids)}])
    expected, found = observed(models[0]), observed(models[1])
    assert all(torch.equal(found[name], x) for name, x in expected.items())


@pytest.mark.parametrize(
    ("batches", "error", "message"),
    [
        (lambda ids: {"input_ids": ids}, InputError, r"an iterable of batches, not a dict"),
        (lambda ids: None, InputError, "an iterable of batches, not a NoneType"),
        (lambda ids: ["some text"], InputError, "a mapping with input_ids.*not a str"),
        (lambda ids: [(ids, ids)], InputError, "not a tuple"),
        (lambda ids: [{"ids": ids}], InputError, "must have input_ids.*this one has ids"),
        (lambda ids: [{}], InputError, "must have input_ids.*this one has nothing"),
        (lambda ids: [{"input_ids": ids.tolist()}], DTypeError, "a tensor of integers, not list"),
        (lambda ids: [{"input_ids": ids, "attention_mask": -ids.float()}], InputError, "mask"),
        (lambda ids: [ids[:0]], ShapeError, r"must be \(B, N\), B, N >= 1"),
        (lambda ids: [ids, ids[0]], ShapeError, r"must be \(B, N\)"),
        (lambda ids: (x for x in [ids, ids + 61]), InputError, "another model's tokenizer"),
    ],
)
def test_what_is_no_batch_is_refused_and_changes_nothing(build, tokens, batches, error, message):
    model, ids = build("ptq_int8"), tokens(2, 9)
    with pytest.raises(error, match=message):
        model.calibrate_quantization(batches(ids))
    assert model.quantization_state.value == "float"
    assert not conversion.core_quantizers(model)
