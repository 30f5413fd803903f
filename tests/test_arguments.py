"""Public callables with arguments that nobody should pass: a result, or an error that names one.

The kernels' own functions among the public names are tested with the kernels, the language model's
with the model.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor

import bkcore
import bkcore.core
import bkcore.kernels
import bkcore.quantization
from bkcore.arguments import did_you_mean
from bkcore.bench.inference import run_inference
from bkcore.bench.kernels import run_kernels
from bkcore.core import bounds, enclosures, operator
from bkcore.errors import BKCoreError
from bkcore.model import LanguageModel, ResNetBKConfig, ResNetBKForCausalLM
from bkcore.quantization import QuantizationConfig
from bkcore.training import Schedule
from bkcore.training.recipe import read_recipe

B, N, H = 2, 4, 3
ELSEWHERE = {
    *("LanguageModel", "ResNetBKConfig", "ResNetBKForCausalLM"),
    *("BKCoreError", "QuantizationState"),
}


def potential(*shape: int) -> Tensor:
    return torch.linspace(-1, 1, math.prod(shape)).reshape(shape)


def attention() -> dict[str, Any]:
    wide, chain = potential(B, N, H, 2), potential(B, N, H)
    inputs = {"query": wide, "key": wide, "value": wide, "hopping": chain, "potential": chain}
    return {**inputs, "eta": torch.ones(H), "state": None}


def calibrated(quantizer, *, imag: bool = False):
    x = potential(5, N)
    quantizer.calibrate(torch.complex(x, x + 1) if imag else x)
    return quantizer


def quantized(mode: str = "ptq_int4"):
    core = bkcore.create_quantized_birman_schwinger(N, mode)
    core.start_calibration()
    core(potential(5, N))
    core.end_calibration()
    core.apply_ptq()
    return core


V = potential(B, N)
G = bkcore.resolvent_diagonal(V, 1j)
CODES = torch.tensor([[1, -2, 3, 4]], dtype=torch.int8)
CHAIN = {"hopping": 1.0, "onsite": -2.0}
SWEEP = {"v": potential(B, N, H), "source": potential(B, N, H), "energy": 0.1, "eta": 1.0, **CHAIN}
DIAGONAL = {"v": V, "z": 1j, **CHAIN, "causal": False}
OPERATOR = bkcore.core.BirmanSchwingerOperator(V, 1j)
REAL, COMPLEX = bkcore.GroupWiseQuantizer, bkcore.ComplexQuantizer
OPTIONS: dict[str, Any] = {
    "bits": 8,
    "symmetric": True,
    "learnable": False,
    "norm": 1,
    "observer": None,
}
OPTIONS |= {"percentile": 99.0, "nonuniform": False, "shared_zero_point": False, "group_size": 2}
NUMBERS = {"epsilon": 1.0, "energy": 0.0, **CHAIN, "causal": False}

CALLS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "BirmanSchwingerCore": (bkcore.BirmanSchwingerCore, {"n_seq": N, **NUMBERS}),
    "BirmanSchwingerCore.forward": (bkcore.BirmanSchwingerCore(N), {"v": V}),
    "resolvent_diagonal": (bkcore.resolvent_diagonal, DIAGONAL),
    "causal_sweep": (bkcore.causal_sweep, SWEEP),
    "causal_sweep_parts": (bkcore.core.causal_sweep_parts, SWEEP),
    "resolvent_attention": (bkcore.resolvent_attention, attention()),
    "resolvent_attention, later": (
        bkcore.resolvent_attention,
        {**attention(), "state": bkcore.resolvent_attention(**attention())[2]},
    ),
    "BirmanSchwingerOperator": (
        bkcore.core.BirmanSchwingerOperator,
        {"v": V, "z": 1j, **CHAIN},
    ),
    "BirmanSchwingerOperator.apply": (OPERATOR.apply, {"x": V}),
    "resolvent_apply": (bkcore.core.resolvent_apply, {"v": V, "z": 1j, "source": V, **CHAIN}),
    "spectral_shift": (bkcore.core.spectral_shift, {"v": V, "energy": 0.5, **CHAIN}),
    "weighted_row_norms": (operator.weighted_row_norms, {**DIAGONAL, "weights": V.abs()}),
    "ward_bound": (bounds.ward_bound, {**DIAGONAL, "v_perturbed": V + 0.1}),
    "diagonal_enclosure": (enclosures.diagonal_enclosure, {**DIAGONAL, "v_perturbed": V + 0.1}),
    "maximum_bound": (bounds.maximum_bound, {"dv": V, "G": G, "G_perturbed": G, "eta": 1.0}),
    "uniform_bound": (bounds.uniform_bound, {"dv": V, "eta": 1.0}),
    "disc_range": (bounds.disc_range, {"eta": 1.0}),
    "in_disc": (bounds.in_disc, {"G": G, "eta": 1.0}),
    "contraction_factor": (bounds.contraction_factor, {"hopping": 1.0, "eta": 1.0}),
    "QuantizationConfig": (
        bkcore.QuantizationConfig,
        {**bkcore.QuantizationConfig().to_dict(), "tensor_bits": {"a": 4}},
    ),
    "QuantizationConfig.from_dict": (
        bkcore.QuantizationConfig.from_dict,
        {"fields": bkcore.QuantizationConfig().to_dict()},
    ),
    "QuantizedBirmanSchwingerCore": (
        bkcore.QuantizedBirmanSchwingerCore,
        {"n_seq": N, "config": "ptq_int8", **NUMBERS},
    ),
    "QuantizedBirmanSchwingerCore.forward": (quantized(), {"v": V}),
    "QuantizedBirmanSchwingerCore.error_bound": (
        quantized().error_bound,
        {"v": V, "features": quantized()(V)},
    ),
    "create_quantized_birman_schwinger": (
        bkcore.create_quantized_birman_schwinger,
        {"n_seq": N, "mode": "ptq_int8", "epsilon": 1.0, "group_size": 2},
    ),
    "GroupWiseQuantizer": (REAL, {"num_channels": N, **OPTIONS}),
    "GroupWiseQuantizer.observe": (
        lambda **arguments: REAL(N).observe(**arguments),
        {"x": V, "weight": V.abs()},
    ),
    "GroupWiseQuantizer.calibrate": (REAL(N).calibrate, {"x": V}),
    "GroupWiseQuantizer.quantize": (calibrated(REAL(N)).quantize, {"x": V}),
    "GroupWiseQuantizer.dequantize": (calibrated(REAL(N)).dequantize, {"codes": CODES}),
    "GroupWiseQuantizer.fake_quantize": (calibrated(REAL(N)).fake_quantize, {"x": V}),
    "GroupWiseQuantizer.clips": (calibrated(REAL(N)).clips, {"x": V}),
    "ComplexQuantizer": (COMPLEX, {"num_channels": N, "per_channel": True, **OPTIONS}),
    "ComplexQuantizer.calibrate": (COMPLEX(N).calibrate, {"x": G}),
    "ComplexQuantizer.quantize": (calibrated(COMPLEX(N), imag=True).quantize, {"x": G}),
    "ComplexQuantizer.fake_quantize": (calibrated(COMPLEX(N), imag=True).fake_quantize, {"x": G}),
    "ComplexQuantizer.dequantize": (
        calibrated(COMPLEX(N), imag=True).dequantize,
        {"real": CODES, "imag": CODES},
    ),
    "pack_int4": (bkcore.quantization.pack_int4, {"codes": CODES}),
    "unpack_int4": (
        bkcore.quantization.unpack_int4,
        {"packed": bkcore.quantization.pack_int4(CODES), "length": N},
    ),
}

NO_NUMBERS = [None, "x", "1j", b"1", [], [1.0], {}, {"a": 3}, object(), torch.float32, print]
NUMBERS_OF_ALL_KINDS = [
    *(True, False, 0, 1, -1, 2**70, -(2**70), 10**400, 0.0, -1.0, 1e-320, 1e-30, 1e30, 1e300),
    *(math.nan, math.inf, -math.inf, 1j, complex(math.nan, 1), complex(1, math.inf), 1e300j),
    *(np.float32(0.5), np.float64(0.5), np.int64(3), np.complex64(1 + 1j), np.bool_(True)),
    *(np.array(0.5), np.ones(3), np.float16(60000)),
]
TENSORS = [
    *(torch.tensor(x) for x in (0.5, -0.5, 0.0, math.nan, math.inf, 3, True, 1j, 1e-30, 1e30)),
    *(torch.ones(shape) for shape in [(1,), (N,), (N + 1,), (B, N + 1), (7, N), (B, N, H, 2, 1)]),
    *(torch.ones(shape) for shape in [(0,), (0, N), (B, 0), (B, 0, H), (0, N, H), (B, N, 0)]),
    torch.tensor(0.5, requires_grad=True),
    torch.ones(N, dtype=torch.float64, requires_grad=True),
    torch.ones((), device="meta"),
]


def variants(value: object) -> list[object]:
    """The same argument with something wrong, or unusual."""
    found = [*NO_NUMBERS, *NUMBERS_OF_ALL_KINDS, *TENSORS]
    if not isinstance(value, Tensor):
        return found
    kinds = (torch.bfloat16, torch.float64, torch.int64, torch.bool, torch.complex128, torch.int8)
    part = value.real if value.is_complex() else value
    found += [part.to(dtype) for dtype in (*kinds, torch.uint8, torch.float16)]
    found += [value.to("meta"), value[None], value[0], value[..., :0], value[:0], value[..., :1]]
    found += [torch.full_like(value, x) for x in (0, 1)]
    if value.dtype.is_floating_point or value.is_complex():
        found += [torch.full_like(value, x) for x in (math.nan, math.inf, -math.inf, 1e30, -1.0)]
        found += [value.detach().clone().requires_grad_(), value.transpose(0, -1)]
    return found


PARTS = {"z": ("Re z", "Im z"), "config": ("mode",)}
"""What else an error may call an argument."""


def outcome(function: Callable[..., Any], arguments: dict[str, Any]) -> str | None:
    """Why a call is refused, or None if it is not; any other exception is a failure."""
    try:
        function(**arguments)
    except BKCoreError as error:
        if not isinstance(error, TypeError | ValueError | RuntimeError):
            raise
        return str(error)
    return None


def assert_result_or_error(function: Callable[..., Any], arguments: dict[str, Any]) -> None:
    message = outcome(function, arguments)
    names = [*arguments, *(part for name in arguments for part in PARTS.get(name, ()))]
    names.append("calibration")  # has but one argument
    assert message is None or any(re.search(rf"\b{name}\b", message) for name in names), message


def described(value: object) -> str:
    return f"{value.dtype}{tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)


@contextmanager
def telling(call: str) -> Iterator[None]:
    """Have a failure say which call it was."""
    try:
        yield
    except Exception as error:
        raise AssertionError(call) from error


def test_every_public_callable_is_here():
    public = {
        *bkcore.__all__,
        *bkcore.core.__all__,
        *bkcore.quantization.__all__,
    }
    assert public - ELSEWHERE <= CALLS.keys()


@pytest.mark.parametrize("name", CALLS)
def test_hostile_arguments(name):
    function, arguments = CALLS[name]
    assert outcome(function, arguments) is None
    for argument, value in arguments.items():
        for wrong in variants(value):
            with telling(f"{name}({argument}={described(wrong)})"):
                assert_result_or_error(function, {**arguments, argument: wrong})


NUMBER_KINDS = [0.5, np.float32(0.5), np.float64(0.5), torch.tensor(0.5)]


@pytest.mark.parametrize("half", NUMBER_KINDS, ids=lambda x: type(x).__name__)
def test_numbers_of_any_kind_give_the_same_bits(half):
    v, chain = potential(B, N), potential(B, N, H)
    options = {"hopping": half, "onsite": half}
    z = torch.complex(half, half) if isinstance(half, Tensor) else complex(half, half)
    want = bkcore.resolvent_diagonal(v, 0.5 + 0.5j, hopping=0.5, onsite=0.5)
    assert torch.equal(bkcore.resolvent_diagonal(v, z, **options), want)
    got: Any = bkcore.causal_sweep(chain, energy=half, eta=half, **options)
    expected: Any = bkcore.causal_sweep(chain, energy=0.5, eta=0.5, hopping=0.5, onsite=0.5)
    assert torch.equal(got, expected)
    inputs = attention()
    got, want = (
        bkcore.resolvent_attention(**{**inputs, "eta": eta})[0]
        for eta in (half, torch.full((H,), 0.5))
    )
    assert torch.equal(got, want)
    core = bkcore.BirmanSchwingerCore(N, half, energy=half, **options)
    assert (core.epsilon, core.hopping) == (0.5, 0.5)
    shift = bkcore.core.spectral_shift(v, half, **options)
    assert torch.equal(shift, bkcore.core.spectral_shift(v, 0.5, hopping=0.5, onsite=0.5))


def test_attention_names_what_does_not_fit():
    inputs = attention()
    for name, x in inputs.items():
        if isinstance(x, Tensor):
            with pytest.raises(BKCoreError, match=rf"^{name} "):
                bkcore.resolvent_attention(**{**inputs, name: torch.ones(B, N)})
    g, psi = bkcore.resolvent_attention(**inputs)[2]
    with pytest.raises(BKCoreError, match=r"^state\[1\] must be"):
        bkcore.resolvent_attention(**{**inputs, "state": (g, psi[..., :1])})


# ---- misspelt names --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "hint"),
    [
        ("stpes", "; did you mean 'steps'?"),
        ("STEPS", "; did you mean 'steps'?"),
        ("sede", "; did you mean 'seed'?"),
        (["stpes", "sede"], "; did you mean 'steps' or 'seed'?"),
        ("int8", "; did you mean 'qat_int8' or 'ptq_int8'?"),
        ("nonsense", ""),
        (3, ""),
        (None, ""),
        ("steps" * 10**6, ""),
        (["nonsense"] * 10**6, ""),
    ],
)
def test_the_nearest_names_are_suggested(given: object, hint: str) -> None:
    assert did_you_mean(given, ["steps", "seed", "ptq_int8", "qat_int8"]) == hint


def recipe(tmp_path: Path, content: str) -> object:
    path = tmp_path / "recipe.yaml"
    path.write_text(content, encoding="utf-8")
    return read_recipe(path)


def with_bits(name: str) -> None:
    model = LanguageModel(50, 16, 1, 16, num_experts=2, expert_size=24)
    model.configure_quantization(QuantizationConfig(tensor_bits={name: 4}))


def forced(name: str) -> None:
    with bkcore.kernels.use_backend(name):
        pass


TRAINING = "training: {steps: 1, batch_size: 1, learning_rate: 1}\n"
MISSPELT: dict[str, Callable[[Path], object]] = {
    "training": lambda folder: recipe(folder, "trainnig: {}"),
    "steps": lambda folder: recipe(folder, "training: {stpes: 1}"),
    "vocab_size": lambda folder: recipe(folder, f"{TRAINING}tokenizer: {{vocabsize: 300}}"),
    "d_model": lambda folder: recipe(folder, f"{TRAINING}model: {{d_modle: 16}}"),
    "muon": lambda _: Schedule(1, 1, 1.0, optimizer="moun"),
    "linear": lambda _: Schedule(1, 1, 1.0, scheduler="Linear"),
    "ptq_int4": lambda _: QuantizationConfig("ptq-int4"),
    "minmax": lambda _: QuantizationConfig(observer="min_max"),
    "nearest": lambda _: QuantizationConfig(weight_rounding="nearst"),
    "group_size": lambda _: QuantizationConfig.from_dict({"groupsize": 8}),
    "layers.0.experts.experts.0.up": lambda _: with_bits("layers.0.experts.0.up"),
    "resolvent": lambda _: LanguageModel(50, mixer="resolvant"),
    "num_experts": lambda _: LanguageModel(50, num_expert=2),
    "quantized": lambda _: ResNetBKConfig(quantization={"state": "quantised"}),
    "subfolder": lambda folder: ResNetBKForCausalLM.from_pretrained(folder, subfolders="a"),
    "float16": lambda folder: ResNetBKForCausalLM.from_pretrained(folder, dtype="float61"),
    "reference": lambda _: forced("referenced"),
    "growth": lambda _: run_kernels(Console(quiet=True), "grwoth"),
    "serving": lambda _: run_inference(Console(quiet=True), "servign"),
}


@pytest.mark.parametrize("right", MISSPELT)
def test_messages_that_list_names_suggest_the_nearest(right: str, tmp_path: Path) -> None:
    with pytest.raises(BKCoreError, match=rf"; did you mean .*{re.escape(repr(right))}.*\?$"):
        MISSPELT[right](tmp_path)
