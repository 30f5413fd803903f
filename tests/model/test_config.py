"""What a configuration takes, and what its mixer lets a model do."""

from __future__ import annotations

from typing import Any

import pytest

from bkcore.errors import InputError
from bkcore.model import ResNetBKConfig


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("vocab_size", 0),
        ("d_model", -1),
        ("n_layers", 1.5),
        ("conv_width", 0),
        ("experts_per_token", 0),
        ("dropout", 1.0),
        ("dropout", -0.1),
    ],
)
def test_impossible_sizes(field, value):
    with pytest.raises(InputError, match=field):
        ResNetBKConfig(**{field: value})


def test_more_experts_per_token_than_experts():
    with pytest.raises(InputError, match="experts_per_token=3 exceeds num_experts=2"):
        ResNetBKConfig(num_experts=2, experts_per_token=3)


def test_config_survives_json(tmp_path):
    config = ResNetBKConfig(vocab_size=7, norm_eps=0.01, quantization={"mode": "ptq_int8"})
    config.save_pretrained(tmp_path)
    assert ResNetBKConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(InputError, match="num_heads=5 must divide d_model=24, unless value_size"):
        ResNetBKConfig(vocab_size=61, d_model=24, num_heads=5)
    assert ResNetBKConfig(vocab_size=61, d_model=24, num_heads=5, value_size=6).value_width == 30
    with pytest.raises(InputError, match="value_size must be None or a positive integer, not 0"):
        ResNetBKConfig(vocab_size=61, value_size=0)
    with pytest.raises(InputError, match="key_groups=3 must divide num_heads=4"):
        ResNetBKConfig(vocab_size=61, num_heads=4, key_groups=3)


@pytest.mark.parametrize("multiplier", [0.0, -1.0, float("inf"), float("nan")])
def test_multipliers_that_are_not_positive_are_refused(multiplier):
    with pytest.raises(InputError, match="embedding_multiplier must be positive"):
        ResNetBKConfig(vocab_size=61, embedding_multiplier=multiplier)


def test_impossible_configurations_are_named():
    with pytest.raises(InputError, match="mixer must be one of resolvent, convolution, green"):
        ResNetBKConfig(mixer="lstm")
    with pytest.raises(InputError, match="must divide d_model"):
        ResNetBKConfig(d_model=128, num_heads=3)
    with pytest.raises(InputError, match="key_size"):
        ResNetBKConfig(key_size=0)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("quantization_config", {}), ("text_config", {}), ("to_dict", 1), ("_x", 1)],
        *[("note", float("nan")), ("note", object()), ("note", "x" * (1 << 20))],
        *[("note", "\ud800"), ("sep_token_id", "x"), ("max_position_embeddings", "x")],
    ],
)
def test_what_is_no_note(name: str, value: Any) -> None:
    with pytest.raises(InputError, match=f"{name}.*cannot be|cannot have '{name}'"):
        ResNetBKConfig(**{name: value})
