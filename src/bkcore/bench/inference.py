"""The cases of `bkcore bench inference`: quantized models against float32, and against rivals.

Models have random weights, since no time depends on what they say. Before a quantized model is
timed, its products are compared bit for bit with those of the reference backend, and its streamed
logits with those of the parallel pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from transformers import PreTrainedModel

from bkcore.arguments import starting_with
from bkcore.bench import rival_models
from bkcore.bench.random_models import MODES, quantized, random_model
from bkcore.bench.result import Result
from bkcore.bench.settings import WIDTHS
from bkcore.bench.timing import Call, interleaved
from bkcore.display.progress import Plan
from bkcore.errors import BenchmarkError
from bkcore.host import torch_threads
from bkcore.kernels import use_backend
from bkcore.model import ResNetBKForCausalLM, StreamState
from bkcore.quantization.linear import QuantizedLinear
from bkcore.quantization.weights import PackedWeight, pack_weight
from bkcore.training.onednn import onednn_products
from bkcore_runtime import Engine

LAYERS = ((16, 16), (32, 32), (64, 32), (64, 64), (128, 128), (256, 256), (512, 512))
ROWS = (1, 64, 1024)
SEQUENCES = (1, 8, 64)
CONTEXTS = (512, 4096, 16384)

_PREFILL_TARGETS = {"INT8": 2.0, "INT4": 1.5}
_DECODE_TARGETS = {"INT8": 1.5, "INT4": 2.0}
# From these widths on there are targets; below them, a quantized model must only not be slower.
_PREFILL_WIDTH, _DECODE_WIDTH = 256, 512
_VOCABULARY = 4096
_LAYERS = 4
_BATCH, _WINDOW = 8, 512
_RIVAL_WIDTH, _SERVING_WIDTH, _LOOP_WIDTH = 256, 512, 256
_LOOP = 256  # tokens that a loop writes
_RUNTIME = "bkcore_runtime"
_CALIBRATION = (4, 128)
_MOST_SECONDS = 10.0  # of a rival's prefill


@dataclass(frozen=True)
class Decoder:
    """A model in the middle of a text. Each call reads one more token of each sequence, always from
    the same state."""

    model: ResNetBKForCausalLM
    state: StreamState
    tokens: Tensor

    def __call__(self) -> Tensor:
        logits: Tensor = self.model(self.tokens, cache_params=self.state).logits
        return logits


@torch.inference_mode()
def run_inference(console: Console, only: str = "") -> list[Result]:
    """Time every case whose name starts with `only`, with progress on the console.

    Raises:
        InputError: if no case has such a name.
        BenchmarkError: if a quantized model is wrong.
    """
    counts = sorted({1, min(2, torch.get_num_threads())})
    cases: dict[str, Callable[[], Iterator[Result]]] = {
        "layers": partial(_each, single_layers, LAYERS, counts),
        **{f"width {width}": partial(_each, at_width, width, counts) for width in WIDTHS},
        "loops": partial(loops, counts[0]),
        "serving": partial(_each, serving, SEQUENCES, counts),
        "rivals": partial(_each, against_rivals, CONTEXTS, counts[-1:]),
    }
    chosen = starting_with(only, cases, "case")
    results: list[Result] = []
    with Plan(dict.fromkeys(chosen, 60.0), console) as plan:
        for name in chosen:
            with plan.stage(name):
                results += cases[name]()
    return results


def _each(case: Callable[..., Iterator[Result]], size: Any, counts: Sequence[int]) -> Any:
    for threads in counts:
        with torch_threads(threads):
            yield from case(size, threads)


def build(width: int) -> dict[str, ResNetBKForCausalLM]:
    """A float32 model and its quantized versions, by name; checked."""
    model = random_model(
        vocab_size=_VOCABULARY,
        d_model=width,
        n_layers=_LAYERS,
        n_seq=_WINDOW,
        expert_size=2 * width,
    )
    models = {"float32": model}
    for name, mode in MODES.items():
        models[name] = quantized(model, mode, _tokens(*_CALIBRATION))
        check_products(models[name])
    for model in models.values():
        check_stream(model)
    return models


def check_products(model: nn.Module) -> None:
    """Compare every integer product with that of the reference backend.

    Raises:
        BenchmarkError: if a bit differs.
    """
    for name, layer in model.named_modules():
        if isinstance(layer, QuantizedLinear) and isinstance(layer.weight, PackedWeight):
            x = torch.randn(5, layer.weight.shape[1])
            with use_backend("reference"):
                expected = layer(x)
            if not torch.equal(layer(x), expected) or not torch.equal(layer(x[:1]), expected[:1]):
                raise BenchmarkError(
                    f"the product of {name} differs from that of the reference backend"
                )


def check_stream(model: ResNetBKForCausalLM) -> None:
    """Compare the logits of single tokens with those of a whole text.

    Raises:
        BenchmarkError: if they differ by more than rounding.
    """
    tokens = _tokens(1, 24)
    whole = model(tokens).logits
    state = model(tokens[:, :16], use_cache=True).cache_params
    for index in range(16, 24):
        output = model(tokens[:, index : index + 1], cache_params=state)
        state, expected = output.cache_params, whole[0, index]
        error = float((output.logits[0, 0] - expected).abs().max())
        if not error <= 1e-3 * float(expected.abs().max()):
            raise BenchmarkError(f"a streamed token has logits that differ by {error:.2e}")


def single_layers(shapes: Sequence[tuple[int, int]], threads: int) -> Iterator[Result]:
    """One quantized layer against the same in float: which sizes pay off, and for how many rows."""
    for outputs, inputs in shapes:
        layer = nn.Linear(inputs, outputs, bias=False)
        packed = {
            name: QuantizedLinear(pack_weight(layer.weight, bits, inputs))
            for name, bits in (("INT8", 8), ("INT4", 4))
        }
        check_products(nn.ModuleList(packed.values()))
        for rows in ROWS:
            x = torch.randn(rows, inputs)
            calls: dict[str, Call] = {"float32": partial(layer, x)}
            calls |= {name: partial(coded, x) for name, coded in packed.items()}
            shape = (rows, inputs, outputs)
            yield from (row for _, row in _against_float("layer", shape, threads, calls))


def at_width(width: int, threads: int) -> Iterator[Result]:
    """Prefill and decoding, each mode against float32; and float32 prefill by oneDNN, which on some
    processors is faster than PyTorch's default."""
    models = build(width)
    batch = _tokens(_BATCH, _WINDOW)
    prefill: dict[str, Call] = {name: partial(model, batch) for name, model in models.items()}
    prefill["float32 by oneDNN"] = onednn_products()(prefill["float32"])
    for name, row in _against_float(f"prefill {width}", (_BATCH, _WINDOW), threads, prefill):
        if name in _PREFILL_TARGETS:
            row = _with_target(row, _PREFILL_TARGETS[name] if width >= _PREFILL_WIDTH else 1.0)
        yield row
    for name, row in _against_float(
        f"decode {width}", (1, 1), threads, _decoders(models, batch, [_WINDOW])
    ):
        yield _with_target(row, _DECODE_TARGETS[name] if width >= _DECODE_WIDTH else 1.0)


def loops(threads: int) -> Iterator[Result]:
    """Tokens of one text, by the loops that a user can write it with, against the runtime's own.

    Raises:
        BenchmarkError: if a quantized model writes another text in another loop.
    """
    first = _tokens(1, 1)
    with torch_threads(threads):
        for name, model in build(_LOOP_WIDTH).items():
            with TemporaryDirectory() as folder:
                model.save_pretrained(folder)
                engine = Engine(folder, threads=threads)
            calls = _loops(model, engine, first)
            texts = [call() for call in calls.values()]
            if name != "float32" and any(text != texts[0] for text in texts):
                raise BenchmarkError(f"{name}: the loops write different texts")
            times = dict(zip(calls, interleaved(*calls.values()), strict=True))
            baseline = times.pop(_RUNTIME)
            for loop, seconds in times.items():
                note = f"{1e6 * seconds / _LOOP:,.0f} us a token, of {1e6 * baseline / _LOOP:,.0f}"
                yield Result(
                    f"{loop} {name}", (1, _LOOP), threads, seconds, baseline, _RUNTIME, note=note
                )


def _loops(model: Any, engine: Engine, first: Tensor) -> dict[str, Callable[[], list[int]]]:
    """Calls that write `_LOOP` tokens after the first (1, 1)."""
    (ids,) = first.tolist()

    def by_stream() -> list[int]:
        tokens = model.stream(first, temperature=0.0)
        return [int(token) for token, _ in islice(tokens, _LOOP)]

    def by_generate() -> list[int]:
        text = model.generate(first, max_new_tokens=_LOOP, do_sample=False, eos_token_id=None)
        return list(map(int, text[0, 1:]))

    return {
        _RUNTIME: lambda: list(engine.generate(ids, _LOOP, stop=())),
        "model.stream": by_stream,
        "model.generate": by_generate,
    }


def serving(counts: Sequence[int], threads: int) -> Iterator[Result]:
    """One more token of sequences of different lengths in one batch."""
    models = build(_SERVING_WIDTH)
    batch = _tokens(1, _WINDOW)
    for count in counts:
        ages = [1 + n * (_WINDOW - 1) // count for n in range(count)]
        rows = _against_float("serving", (count, 1), threads, _decoders(models, batch, ages), True)
        for _, row in rows:
            yield Result(**{**vars(row), "note": f"{count / row.seconds:,.0f} tokens a second"})


def against_rivals(contexts: Sequence[int], threads: int) -> Iterator[Result]:
    """ResNet-BK against GPT-2 and Mamba with as many parameters: prefill of a context, and decoding
    after it. A prefill that would take too long is left out."""
    ours = build(_RIVAL_WIDTH)
    parameters = sum(p.numel() for p in ours["float32"].parameters())
    slowest: dict[str, float] = {}
    for before, context in zip((0, *contexts), contexts, strict=False):
        text, token = _tokens(1, context), _tokens(1, 1)
        decoders = _decoders(ours, text, [context])
        for rival in rival_models.build(parameters, _VOCABULARY, context):
            expected = slowest.get(rival.name, 0.0) * (context / max(before, 1)) ** rival.order
            note = f"{rival.parameters / 1e6:.1f} M parameters, here {parameters / 1e6:.1f} M"
            for mine, theirs in (("float32", "float32"), ("INT8", "INT8"), ("INT4", "INT8")):
                model = rival.models[theirs]
                calls = {"decode": (decoders[mine], rival_models.decoder(model, text, token))}
                if expected < _MOST_SECONDS:
                    calls["prefill"] = partial(ours[mine], text), rival_models.prefill(model, text)
                for kind, pair in calls.items():
                    seconds, baseline = interleaved(*pair)
                    if kind == "prefill":
                        slowest[rival.name] = max(slowest.get(rival.name, 0.0), baseline)
                    name, shape = f"{kind} at {context} {mine}", (1, context)
                    other = f"{rival.name} {theirs}"
                    yield Result(name, shape, threads, seconds, baseline, other, note=note)


def _against_float(
    name: str,
    shape: tuple[int, ...],
    threads: int,
    calls: Mapping[str, Call],
    include: bool = False,
) -> Iterator[tuple[str, Result]]:
    """A row for each mode, and with `include` one for float32 itself, all timed in alternation."""
    seconds = dict(zip(calls, interleaved(*calls.values()), strict=True))
    for mode, time in seconds.items():
        if include or mode != "float32":
            row = Result(f"{name} {mode}", shape, threads, time, seconds["float32"], "float32")
            yield mode, row


def _with_target(row: Result, target: float) -> Result:
    return Result(**{**vars(row), "target": target})


def _decoders(
    models: dict[str, ResNetBKForCausalLM], text: Tensor, ages: Sequence[int]
) -> dict[str, Call]:
    """Decoders of every model, with one sequence per age that has read the first `age` tokens."""
    tokens = _tokens(len(ages), 1)
    return {
        name: Decoder(model, StreamState.batch([_read(model, text[:1, :n]) for n in ages]), tokens)
        for name, model in models.items()
    }


def _read(model: PreTrainedModel, text: Tensor) -> StreamState:
    state: StreamState = model(text, use_cache=True).cache_params
    return state


def _tokens(*shape: int) -> Tensor:
    return torch.randint(_VOCABULARY, shape)
