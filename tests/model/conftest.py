"""Small language models in every mode and state."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bkcore.model import LanguageModel, ResNetBKForCausalLM
from bkcore.quantization import QuantizationConfig

VOCABULARY = 61

MODES = ("ptq_int8", "qat_int8", "ptq_int4", "qat_int4", "mixed_precision")

FORMS: list[tuple[str | None, str]] = [(None, "float")]
FORMS += [(mode, state) for mode in MODES for state in ("float", "calibrated", "quantized")]
FORMS += [(mode, "training") for mode in ("qat_int8", "qat_int4")]
EXECUTED = [form for form in FORMS if form[1] in ("training", "quantized") or form[0] is None]

Build = Callable[..., ResNetBKForCausalLM]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=MODES)
def mode(request: pytest.FixtureRequest) -> str:
    """Every quantization mode."""
    return request.param


@pytest.fixture(params=FORMS, ids=lambda form: f"{form[0]}-{form[1]}")
def form(request: pytest.FixtureRequest) -> tuple[str | None, str]:
    """A mode (or None) and a state in which a model may be saved and used."""
    return request.param


@pytest.fixture(params=FORMS[1:], ids=lambda form: f"{form[0]}-{form[1]}")
def quantizing_form(request: pytest.FixtureRequest) -> tuple[str, str]:
    """The same, without the model that has no mode."""
    return request.param


@pytest.fixture(
    params=EXECUTED,
    ids=lambda form: f"{form[0]}-{form[1]}",
)
def executed_form(request: pytest.FixtureRequest) -> tuple[str | None, str]:
    """A mode and state whose forward pass is a different one: float, training, quantized."""
    return request.param


@pytest.fixture
def tokens() -> Callable[..., Tensor]:
    """tokens(B, N) draws token ids."""
    return lambda *shape: torch.randint(VOCABULARY, shape)


@pytest.fixture
def build() -> Build:
    """build(mode, state, **options) makes a small model in evaluation mode.

    The output projection of the mixer starts at zero, so that a new model ignores its core: here
    it is random. Gates and barriers begin weak, and here they are strong. Sizes leave ragged groups
    (24 and 40 inputs in groups of 16).
    """

    def build(mode: str | None = None, state: str = "float", **options: Any) -> ResNetBKForCausalLM:
        return copy.deepcopy(_build(mode, state, tuple(sorted(options.items()))))

    return build


@cache
def _build(
    mode: str | None, state: str, options: tuple[tuple[str, Any], ...]
) -> ResNetBKForCausalLM:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        sizes: dict[str, Any] = {
            "vocab_size": VOCABULARY,
            "d_model": 24,
            "n_layers": 2,
            "n_seq": 32,
            "key_size": 7,
        }
        sizes |= {"num_experts": 4, "experts_per_token": 2, "expert_size": 40}
        sizes |= {"embedding_multiplier": 5.0, **dict(options)}
        model: Any = LanguageModel(**sizes)
        for layer in model.layers:
            torch.nn.init.normal_(layer.mixer.out_proj.weight, std=0.2)
            if model.config.mixer == "resolvent":
                layer.mixer.in_proj.weight.data[-2 * layer.mixer.heads :] *= 5
                layer.mixer.log_rate.data.fill_(-0.5)
                layer.mixer.log_barrier.data.fill_(-1.0)
        model.embedding.weight.data.mul_(
            10
        )  # logits far from even, and unit size behind the multiplier
        if mode is not None:
            _quantize(model, mode, state, sizes["vocab_size"])
        return model.eval()


def _quantize(model: ResNetBKForCausalLM, mode: str, state: str, vocabulary: int) -> None:
    model.configure_quantization(QuantizationConfig(mode, group_size=16, min_size=0))
    batches = [torch.randint(vocabulary, (4, 32)) for _ in range(3)]
    if state == "calibrated":
        model.start_calibration()
        for batch in batches:
            model(batch)
        model.end_calibration()
    elif state != "float":
        model.calibrate_quantization(batches)
        if mode.startswith("qat"):
            for name, parameter in model.named_parameters():
                noise = 0.05 if name.endswith("log_scales") else 0.02
                parameter.data.add_(noise * torch.randn_like(parameter))
            if state == "quantized":
                model.convert()
    assert model.quantization_state == state


@pytest.fixture
def folder(build: Any, tmp_path: Path) -> Path:
    """A float model, whole."""
    build().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def quantized(build: Any, tmp_path: Path) -> Path:
    """A quantized model, whole."""
    build("ptq_int4", "quantized").save_pretrained(tmp_path / "quantized")
    return tmp_path / "quantized"
