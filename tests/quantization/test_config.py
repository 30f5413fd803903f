"""QuantizationConfig: what it accepts, what it derives."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest

from bkcore.errors import InputError
from bkcore.quantization import QuantizationConfig

MODES = {
    "PTQ_INT8": ("ptq_int8", 8, False),
    "QAT_INT8": ("qat_int8", 8, True),
    "PTQ_INT4": ("ptq_int4", 4, False),
    "QAT_INT4": ("qat_int4", 4, True),
    "MIXED_PRECISION": ("mixed_precision", 8, False),
}


@pytest.mark.parametrize("name", MODES)
def test_modes(name):
    mode, bits, is_qat = MODES[name]
    assert getattr(QuantizationConfig, name) == mode
    config = QuantizationConfig(mode)
    assert (config.bits, config.is_qat) == (bits, is_qat)
    assert (config.qmin, config.qmax) == {8: (-128, 127), 4: (-8, 7)}[bits]


def test_defaults_are_the_documented_ones():
    config = QuantizationConfig()
    assert config.to_dict() == {
        "mode": "ptq_int8",
        "group_size": 128,
        "per_channel": True,
        "symmetric": None,
        "observer": None,
        "percentile": 99.9,
        "weight_rounding": "gptq",
        "nonuniform": None,
        "min_size": 2048,
    }
    assert QuantizationConfig.from_dict(config.to_dict()) == config
    older = {name: value for name, value in config.to_dict().items() if name != "min_size"}
    assert QuantizationConfig.from_dict(older).min_size == 0


@pytest.mark.parametrize(
    ("mode", "nonuniform", "core", "model"),
    [
        ("ptq_int8", None, False, False),
        ("ptq_int4", None, False, True),
        ("qat_int8", None, True, False),
        ("qat_int4", None, False, True),
        ("ptq_int4", True, False, True),
        ("qat_int4", True, True, True),
        ("qat_int8", False, False, False),
        ("qat_int4", False, False, False),
    ],
)
def test_where_levels_are_uneven(mode, nonuniform, core, model):
    config = QuantizationConfig(mode, nonuniform=nonuniform)
    assert (config.core_has_level_tables, config.has_level_tables) == (core, model)


@pytest.mark.parametrize("mode", MODES.values())
def test_weight_bits(mode):
    name, bits, _ = mode
    parts = {
        part: QuantizationConfig(name).weight_bits(part) for part in ("core", "expert", "head")
    }
    mixed = {"core": 8, "expert": 4, "head": 16}
    assert parts == (mixed if name == "mixed_precision" else dict.fromkeys(parts, bits))


def test_per_tensor_is_one_group():
    assert QuantizationConfig(group_size=16).core_group_size(100) == 16
    assert QuantizationConfig(group_size=16, per_channel=False).core_group_size(100) == 100


def test_it_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        QuantizationConfig().mode = "qat_int8"  # type: ignore[misc]


@pytest.mark.parametrize("mode", ["int8", "ptq_int3", "", None])
def test_unknown_mode_lists_the_choices(mode):
    with pytest.raises(InputError, match=r"unknown quantization mode .*ptq_int8.*mixed_precision"):
        QuantizationConfig(mode)


@pytest.mark.parametrize("group_size", [0, -1, True, 128.0, "128", None])
def test_group_size_is_a_positive_integer(group_size):
    with pytest.raises(InputError, match="group_size must be an integer >= 1"):
        QuantizationConfig(group_size=group_size)


@pytest.mark.parametrize("field", ["per_channel", "symmetric"])
@pytest.mark.parametrize("value", [1, "yes"])
def test_flags_are_bools(field, value):
    with pytest.raises(InputError, match=field):
        QuantizationConfig(**{field: value})


def test_observers_and_percentiles_are_checked():
    with pytest.raises(InputError, match=r"unknown observer 'entropy'.*minmax.*auto"):
        QuantizationConfig(observer="entropy")
    percentiles: list[Any] = [0, 100.5, float("nan"), True, "99"]
    for percentile in percentiles:
        with pytest.raises(InputError, match="percentile must"):
            QuantizationConfig(percentile=percentile)


def test_weights_that_compensate_for_their_errors():
    assert QuantizationConfig("ptq_int4").compensates("core")
    assert QuantizationConfig("ptq_int4").compensates("expert")
    assert not QuantizationConfig("ptq_int4").compensates("head")
    assert not QuantizationConfig("ptq_int4", weight_rounding="nearest").compensates("core")
    assert QuantizationConfig("mixed_precision").compensates("expert")
    for mode in ("mixed_precision", "ptq_int8"):
        assert not QuantizationConfig(mode).compensates("core")
    assert not QuantizationConfig("qat_int4").compensates("expert")
    with pytest.raises(InputError, match=r"unknown weight_rounding 'up'.*gptq.*nearest"):
        QuantizationConfig(weight_rounding="up")


HOSTILE: list[Any] = [
    None,
    2,
    2.5,
    True,
    "x",
    b"x",
    [],
    {},
    math.nan,
    math.inf,
    10**400,
    2**70,
    -(2**70),
]


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(QuantizationConfig)])
def test_a_field_is_taken_as_it_is_or_refused_by_name(field):
    for value in HOSTILE:
        fields: dict[str, Any] = {field: value}
        for build in (lambda fields: QuantizationConfig(**fields), QuantizationConfig.from_dict):
            try:
                config = build(fields)
            except InputError as error:
                refusal = str(error)
            else:
                assert getattr(config, field) == value
                assert QuantizationConfig.from_dict(json.loads(json.dumps(config.to_dict())))
                continue
            assert field in refusal


@pytest.mark.parametrize("text", ['{"group_size": 1e400}', '{"percentile": NaN}', '{"mode": 2}'])
def test_json_that_is_no_configuration(text):
    with pytest.raises(InputError):
        QuantizationConfig.from_dict(json.loads(text))


@pytest.mark.parametrize(
    "fields", [None, 3, [], "mode", [("mode", "ptq_int8")], {"modes": 1}, {3: 1}]
)
def test_only_a_dictionary_of_the_fields_will_do(fields):
    with pytest.raises(InputError, match=r"fields must be a dictionary of group_size, .*not"):
        QuantizationConfig.from_dict(fields)


@pytest.mark.parametrize("bits", [{"a": 5}, {"a": True}, {"a": 4.0}, {3: 4}, {"a": None}, ["a"]])
def test_bits_of_single_weights_are_checked(bits):
    with pytest.raises(InputError, match="tensor_bits"):
        QuantizationConfig("ptq_int4", tensor_bits=bits)
