"""What loading may be asked for: honoured, or refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from bkcore.errors import InputError
from bkcore.model import ResNetBKConfig, ResNetBKForCausalLM


def test_arguments_of_transformers(folder: Path, build: Any) -> None:
    load = ResNetBKForCausalLM.from_pretrained
    for dtype in (torch.float16, "float16"):
        assert load(folder, dtype=dtype).dtype == torch.float16
        assert load(folder, torch_dtype=dtype).config.dtype == torch.float16
    assert load(folder, dtype="auto").dtype == torch.float32
    model, info = load(folder, output_loading_info=True, device_map="cpu", low_cpu_mem_usage=True)
    assert not any(info.values())
    assert model.name_or_path == model.config.name_or_path == str(folder)
    assert load(folder.parent, subfolder="model").config.d_model == 24
    assert load(folder, dropout=0.25).config.dropout == 0.25
    assert load(folder, config=ResNetBKConfig.from_pretrained(folder)).config.d_model == 24
    assert (
        load(str(folder), local_files_only=True, revision="main", token=None).config.n_layers == 2
    )
    auto = AutoModelForCausalLM.from_pretrained(folder, dropout=0.25, dtype="bfloat16")
    assert (auto.config.dropout, auto.dtype) == (0.25, torch.bfloat16)


@pytest.mark.parametrize(
    "options",
    [
        {"foo": 1},
        {"state_dict": {}},
        {"gguf_file": "x"},
        {"quantization_config": {}},
        {"use_safetensors": False},
        {"ignore_mismatched_sizes": True},
        {"attn_implementation": "flash_attention_2"},
        {"dtype": "int8"},
        {"dtype": "nonsense"},
        {"dropout": "x"},
        {"config": "path"},
        {"config": ResNetBKConfig(), "dropout": 0.1},
    ],
)
def test_arguments_that_cannot_be_honoured(folder: Path, options: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        ResNetBKForCausalLM.from_pretrained(folder, **options)


def test_options_that_nobody_asked_for(folder: Path) -> None:
    names = ("quantization_config", "tp_plan", "state_dict", "key_mapping", "config", "dtype")
    model = ResNetBKForCausalLM.from_pretrained(
        folder, **dict.fromkeys(names), pad_token_id=0, eos_token_id=0, output_attentions=False
    )
    assert (model.config.pad_token_id, model.config.eos_token_id) == (0, 0)
    assert model.config.output_attentions is False
    assert ResNetBKForCausalLM.from_pretrained(folder, value_size=None).config.value_size is None
