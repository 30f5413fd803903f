"""The rows of `bkcore bench gpu`: the Triton kernels against a copy, each other and float32; and
the language model against transformers' GPT-2 with PyTorch's own attention.

Times come from Triton's own timer: the median of CUDA events around single calls, with the GPU's
cache emptied before each.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from bkcore.bench import rival_models
from bkcore.bench.kernels import CodedSweep, Gradient
from bkcore.bench.problem import FORMS, Problem, check_parts, random_problem, true_parts
from bkcore.bench.result import Result
from bkcore.display.console import say
from bkcore.errors import BackendError, BenchmarkError
from bkcore.kernels import describe_backends, use_backend
from bkcore.model import LanguageModel, ResNetBKForCausalLM
from bkcore.quantization import QuantizationConfig

SHAPES = ((8, 4096, 1024), (1, 1_048_576, 64))
COPY_FRACTION = 0.5
MOST_BACKWARD = 3.0
LEAST_CODES_SPEEDUP = 1.8


@dataclass(frozen=True)
class Scale:
    """The sizes of the language models and of their inputs.

    Attributes:
        width, layers, vocabulary: of ResNet-BK; GPT-2 has as many parameters, up to one layer.
        window, batch: tokens per text, and texts per training step.
        sequences: how many decode together, each after a text of `window` tokens.
    """

    width: int = 768
    layers: int = 4
    vocabulary: int = 32_000
    window: int = 4_096
    batch: int = 4
    sequences: int = 64


SCALE = Scale()

Timer = Callable[[Callable[[], object]], float]
"""Returns the seconds that a call takes."""


def run_gpu(console: Console, device: str = "cuda", timer: Timer | None = None) -> list[Result]:
    """Check and measure every form of the sweep, and measure the language model.

    Raises:
        BackendError: if there is no GPU or no Triton.
        BenchmarkError: if a result is wrong.
    """
    info = describe_backends()["triton"]
    if device == "cuda" and not torch.cuda.is_available():
        raise BackendError(
            "this measures the Triton kernels, but PyTorch sees no GPU; run it where there is one"
        )
    if not info.available:
        raise BackendError(f"this measures the Triton kernels, but {info.reason}")
    seconds = timer or _seconds
    results: list[Result] = []
    with use_backend("triton"):
        for shape in SHAPES:
            for form in FORMS:
                problem = random_problem(form, shape).to(device)
                results += _shown(console, _rows(problem, seconds))
    # Models are built and quantized on the CPU; once on the GPU, their tensors select the kernels.
    results += _shown(console, _model_rows(SCALE, device, seconds))
    return results


def _shown(console: Console, rows: Iterator[Result]) -> Iterator[Result]:
    for row in rows:
        say(console, f"{row.name} {row.shape}: {row.seconds * 1e3:.3f} ms")
        yield row


def _seconds(call: Callable[[], object]) -> float:
    testing = importlib.import_module("triton.testing")
    return testing.do_bench(call, return_mode="median") / 1e3


def _rows(problem: Problem, seconds: Timer) -> Iterator[Result]:
    form, shape = problem.form, problem.shape
    row = partial(Result, shape=shape, threads=0)
    with torch.inference_mode():
        check_parts(problem, problem.run(), true_parts(problem))
        old = torch.ones(problem.compulsory_bytes // 8, device=problem.v.device)
        new = torch.empty_like(old)
        forward, copy = seconds(problem.run), seconds(lambda: new.copy_(old))
        moved = f"{problem.compulsory_bytes / 1e6:,.0f} MB in and out"
        yield row(
            f"gpu/{form}",
            seconds=forward,
            baseline_seconds=copy,
            baseline="copy",
            target=COPY_FRACTION,
            note=moved,
        )
    gradient = Gradient(problem)
    gradient.check()
    yield row(
        f"gpu/backward/{form}",
        seconds=seconds(gradient.backward),
        baseline_seconds=forward,
        baseline="forward",
        target=1 / MOST_BACKWARD,
    )
    with torch.inference_mode():
        for bits in (8, 4):
            coded = CodedSweep(problem, bits)
            coded.check()
            yield row(
                f"gpu/codes/{form}/int{bits}",
                seconds=seconds(coded.run),
                baseline_seconds=seconds(coded.decoded.run),
                baseline="float32 sweep",
                target=LEAST_CODES_SPEEDUP if bits == 8 else None,
            )


def _model_rows(scale: Scale, device: str, seconds: Timer) -> Iterator[Result]:
    """A training step in bfloat16, and one token of many sequences in codes, against GPT-2."""
    torch.manual_seed(0)
    model = LanguageModel(
        scale.vocabulary,
        d_model=scale.width,
        n_layers=scale.layers,
        n_seq=scale.window,
        expert_size=2 * scale.width,
        chunked_loss=True,
    )
    ours = rival_models.count_parameters(model)
    rival = _gpt2(scale, ours)
    theirs = rival_models.count_parameters(rival)
    millions = f"{ours / 1e6:.0f} M parameters, GPT-2 {theirs / 1e6:.0f}"
    coded = {bits: _quantized(model, bits) for bits in (8, 4)}
    for module in (model, rival, *coded.values()):
        nn.Module.to(module, device)

    ids = torch.randint(scale.vocabulary, (scale.batch, scale.window), device=device)
    step, baseline = (_TrainingStep(each, ids) for each in (model, rival))
    yield Result(
        "gpu/training step, bfloat16 autocast",
        (scale.batch, scale.window),
        0,
        seconds(step),
        seconds(baseline),
        "GPT-2",
        target=1.0,
        note=millions,
    )
    with torch.inference_mode():
        tokens = torch.randint(scale.vocabulary, (scale.sequences, 1), device=device)
        text = tokens.expand(-1, scale.window)
        behind = rival.eval().bfloat16()
        baseline_seconds = seconds(rival_models.decoder(behind, text, tokens))
        for bits, each in coded.items():
            # Its state has a fixed size, whatever it has read.
            state = each(text[:, : min(64, scale.window)], use_cache=True).cache_params
            yield Result(
                f"gpu/decoding INT{bits}",
                (scale.sequences, 1),
                0,
                seconds(partial(each, tokens, cache_params=state)),
                baseline_seconds,
                f"GPT-2 bfloat16 after {scale.window:,}",
                note=millions,
            )


class _TrainingStep:
    """A step of AdamW on ids (B, N); raises `BenchmarkError` if the first loss is not finite."""

    def __init__(self, model: PreTrainedModel, ids: Tensor) -> None:
        self._model, self._ids = model.train(), ids
        self._optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
        loss = self()
        if not bool(torch.isfinite(loss)):
            raise BenchmarkError(f"the loss of {type(model).__name__} is {loss.item()}")

    def __call__(self) -> Tensor:
        with torch.autocast(self._ids.device.type, torch.bfloat16):
            loss: Tensor = self._model(input_ids=self._ids, labels=self._ids).loss
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad()
        return loss.detach()


def _quantized(model: ResNetBKForCausalLM, bits: int) -> ResNetBKForCausalLM:
    """A quantized copy; how its codes are rounded does not affect the time."""
    copy = deepcopy(model).eval()
    copy.configure_quantization(QuantizationConfig(f"ptq_int{bits}", weight_rounding="nearest"))
    copy.calibrate_quantization([torch.randint(model.config.vocab_size, (4, 128))])
    return copy


def _gpt2(scale: Scale, parameters: int) -> PreTrainedModel:
    """GPT-2 of the same width and vocabulary with as many parameters, up to one layer."""

    def make(layers: int) -> GPT2LMHeadModel:
        more: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 0}
        more["attn_implementation"] = "sdpa"
        return GPT2LMHeadModel(
            GPT2Config(
                vocab_size=scale.vocabulary,
                n_embd=scale.width,
                n_layer=layers,
                n_head=max(1, scale.width // 64),
                n_positions=scale.window + 1,
                **more,
            )
        )

    return rival_models.of_size(make, parameters)
