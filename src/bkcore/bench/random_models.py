"""Models with random weights, since no time depends on what they say."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from bkcore.model import LanguageModel, ResNetBKForCausalLM
from bkcore.quantization import QuantizationConfig

MODES = {"INT8": "ptq_int8", "INT4": "ptq_int4"}
"""The modes of quantized models, by what tables call them."""


def random_model(**options: Any) -> ResNetBKForCausalLM:
    """A float model, always the same for the same options of `LanguageModel`."""
    torch.manual_seed(0)
    model = LanguageModel(**options).eval()
    for layer in model.layers:  # a new model's mixers add nothing, and would pass every check
        nn.init.normal_(layer.mixer.out_proj.weight, std=0.05)
    return model


def quantized(model: ResNetBKForCausalLM, mode: str, tokens: Tensor) -> ResNetBKForCausalLM:
    """A quantized copy of a float model, calibrated on tokens (B, N)."""
    copy = deepcopy(model)
    # How weights are rounded does not affect the time.
    copy.configure_quantization(QuantizationConfig(mode, weight_rounding="nearest"))
    copy.calibrate_quantization([tokens])
    return copy.eval()
