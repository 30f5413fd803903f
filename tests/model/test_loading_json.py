"""The JSON in a folder from a stranger: what it may hold, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import GenerationConfig

from bkcore.errors import InputError
from bkcore.model import ResNetBKConfig, ResNetBKForCausalLM
from tests.model.helpers import edit, refused, sign


def of(name: str, *values: Any) -> list[tuple[str, Any]]:
    return [(name, value) for value in values]


WRONG: list[tuple[str, Any]] = [
    *of("vocab_size", True, 61.0, "61", None, [61], {}, -1, 0, 10**30),
    *of("n_seq", 0, 2**31, None),
    *of("dropout", "x", None, True, float("nan"), 1, -0.1, [0]),
    *of("norm_eps", float("inf"), -1, 10**400, "0"),
    *of("embedding_multiplier", 0, None, float("inf"), {"__float__": "NaN"}),
    *of("mixer", 3, None, [], "other"),
    *of("chunked_loss", 1, None, "true"),
    *of("use_cache", 0, []),
    *of("key_groups", 0, 3, True, "2"),
    *of("quantization", 2, "ptq_int8", [], {"mode": []}, {"mode": 1}),
    ("quantization", {"mode": "ptq_int8", "state": "calibrating"}),
    ("quantization", {"mode": "ptq_int8", "state": "unknown"}),
    ("quantization", {"mode": "ptq_int8", "state": ["quantized"]}),
    ("quantization", {"mode": "ptq_int8", "state": "training"}),
    ("quantization", {"mode": "ptq_int8", "more": 1}),
    ("quantization", {"mode": "ptq_int8", "group_size": 1e400}),
    ("quantization", {"mode": "ptq_int8", "tensor_bits": {"embedding": 4.0}}),
    *of("architectures", 3, "ResNetBKForCausalLM", [3]),
    *of("dtype", "nonsense", 3, "int8", "__name__", ["float32"]),
    *of("torch_dtype", "nonsense", 3),
    *of("id2label", 3, {"x": "y"}, {"0": 1}),
    *of("label2id", 3, {"x": "y"}),
    *of("transformers_version", [], 5),
    *of("model_type", "gpt2", 3),
    *of("is_encoder_decoder", True, 1),
    *of("num_labels", 10**9, "2", -1),
    *of("auto_map", 3, {"AutoModel": 3}),
    *of("attn_implementation", "org/model", 3),
    *of("pad_token_id", "0", 2**40, [None]),
    *(
        (name, 3)
        for name in ("attribute_map", "to_dict", "quantization_config", "per_layer_config")
    ),
    *((name, "x") for name in ("transformers_weights", "rope_scaling", "_attn_implementation", "")),
]


@pytest.mark.parametrize(("name", "value"), WRONG, ids=lambda value: f"{value!r:.30}")
def test_a_wrong_value(folder: Path, name: str, value: Any) -> None:
    edit(folder, **{name: value})
    refused(folder, r"config\.json is damaged")
    fields = {**json.loads((folder / "config.json").read_text()), name: value}
    with pytest.raises(InputError):  # for those who build one
        ResNetBKConfig(**fields)


def test_what_others_write_into_a_configuration(folder: Path) -> None:
    edit(
        folder,
        torch_dtype="float32",
        pad_token_id=0,
        eos_token_id=[0, 1],
        temperature=0.5,
        auto_map={"AutoModelForCausalLM": "modeling.Model"},
        architectures=None,
        dropout=0,
    )
    model = ResNetBKForCausalLM.from_pretrained(folder)
    assert (model.config.pad_token_id, model.config.dropout) == (0, 0)


def test_notes_in_a_configuration_are_kept(build: Any, tmp_path: Path) -> None:
    model = build()
    notes = {"pretraining_tp": 1, "is_decoder": True, "note": {"by": ["me", 0.5, None]}}
    for name, value in notes.items():
        setattr(model.config, name, value)
    model.save_pretrained(tmp_path)
    loaded = ResNetBKForCausalLM.from_pretrained(tmp_path).config
    assert {name: getattr(loaded, name) for name in notes} == notes
    other: dict[str, Any] = {"sep_token_id": 3}
    assert ResNetBKConfig(**other).sep_token_id == 3


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("text", ["null", "[]", "3", "", "{", "[" * 100_000, "\udc80"])
def test_json_that_is_no_object(folder: Path, file: str, text: str) -> None:
    (folder / file).write_bytes(text.encode(errors="surrogateescape"))
    sign(folder)
    refused(folder, "is not JSON|must hold a JSON object")


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_json_that_is_too_deep(folder: Path, file: str) -> None:
    deep: Any = 1
    for _ in range(900):
        deep = [deep]
    edit(folder, file, foo=deep)
    refused(folder, "nested more than 64 deep")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *of("temperature", "x", True, 1e400, []),
        *of("top_k", "x", [1]),
        *of("do_sample", 1, "x"),
        ("watermarking_config", 3),
        ("max_new_tokens", -5),
        ("to_dict", 3),
        ("_other", 3),
    ],
)
def test_a_wrong_generation_setting(folder: Path, name: str, value: Any) -> None:
    edit(folder, "generation_config.json", **{name: value})
    refused(folder, r"generation_config\.json")


def test_generation_settings_come_back(build: Any, tmp_path: Path) -> None:
    model = build()
    model.generation_config.temperature = 0.7
    model.generation_config.do_sample = True
    model.generation_config.early_stopping = "never"
    model.generation_config.num_beams = 2
    model.save_pretrained(tmp_path)
    loaded = ResNetBKForCausalLM.from_pretrained(tmp_path)
    assert loaded.generation_config.to_dict() == model.generation_config.to_dict()
    other = GenerationConfig(temperature=0.1, do_sample=True)
    loaded = ResNetBKForCausalLM.from_pretrained(tmp_path, generation_config=other)
    assert loaded.generation_config.temperature == 0.1


@pytest.mark.parametrize(
    "change",
    [
        {"weights": 3},
        {"weights": [3]},
        {"weights": [{}]},
        {"quantization": None},
        {"quantization": {"mode": "other"}},
        {"activations": [{"name": 3}]},
        {"calibration": []},
        {"cores": {}},
        {"training": {"steps": "x"}},
    ],
)
def test_a_wrong_receipt(quantized: Path, change: dict[str, Any]) -> None:
    edit(quantized, "receipt.json", **change)
    refused(quantized, r"receipt\.json is not a receipt")
