"""Bits that are given to weights one by one."""

from __future__ import annotations

import pytest
import torch

from bkcore.errors import InputError
from bkcore.evaluation.bit_budget import check_target
from bkcore.evaluation.sensitivity import units
from bkcore.model import LanguageModel
from bkcore.quantization.budget import average_bits
from bkcore.quantization.config import QuantizationConfig
from tests.slow import combinations


@pytest.mark.parametrize("group_size", combinations([1, 2, 7, 128], quick=[1, 128]))
def test_the_fewest_bits_are_those_of_the_narrowest_weights(group_size: int) -> None:
    model = LanguageModel(50, 16, 1, 16, num_experts=2, expert_size=24)
    least = []
    for bits in (4, 8, 16):
        every = {name: bits for names in units(model).values() for name in names}
        config = QuantizationConfig("mixed_precision", group_size, tensor_bits=every)
        quantized = LanguageModel(50, 16, 1, 16, num_experts=2, expert_size=24)
        quantized.configure_quantization(config)
        quantized.calibrate_quantization([torch.arange(48).view(2, 24)])
        assert quantized.receipt is not None
        least.append(average_bits(quantized.receipt))
    check_target(model, min(least), group_size)
    with pytest.raises(InputError, match="allow more bits"):
        check_target(model, 0.9 * min(least), group_size)
