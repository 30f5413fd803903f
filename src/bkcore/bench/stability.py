"""The cases of `bkcore bench stability`: does a quantized model stay as good while it reads on?

A quantized model and its float reference read the same long text. At growing ages of their states,
both also read the same probe. The divergence of the quantized model's next-token distributions on
the probe shows what it has lost by then. The certificates of its cores on the current text and the
memory of the process are recorded too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from bkcore.bench.machine import machine
from bkcore.bench.process_memory import require_counts, resident_bytes
from bkcore.bench.settings import FIRST_AGE, MOST_A_CALL
from bkcore.display.console import warn
from bkcore.display.progress import Plan
from bkcore.errors import InputError
from bkcore.evaluation.checkpoints import check_tokenizers, load_checkpoint
from bkcore.model import ResNetBKForCausalLM, StreamState, core_certificates
from bkcore.quantization.lifecycle import QuantizationState
from bkcore.text import encode, load_split, warning_of_other_text

_PROBE = 2_048
_CERTIFIED = 512


@dataclass(frozen=True)
class Age:
    """The figures at one age of the states.

    Attributes:
        position: tokens read before.
        kl: mean divergence KL(reference || quantized) on the probe, in nats per token.
        standard_error: of that mean.
        worst: for each layer, the largest ratio of its core's error to the certified bound on the
            tokens before; at most 1.
        resident_bytes: of the process.
    """

    position: int
    kl: float
    standard_error: float
    worst: tuple[float, ...]
    resident_bytes: int


@dataclass(frozen=True)
class Stability:
    """The ages of a model, and how they were measured.

    Attributes:
        protocol: checkpoint, reference, corpus, text_tokens (length of the repeated text),
            probe_tokens, step and threads.
        ages: youngest first.
    """

    protocol: dict[str, Any]
    ages: list[Age]


@torch.inference_mode()
def run_stability(
    console: Console,
    checkpoint: Path,
    reference: Path,
    data: str | Path | None,
    length: int,
    step: int,
) -> Stability:
    """Read `length` tokens of the validation text, over and over again.

    The quantized model reads `step` tokens at a time, the reference 4,096. The probe is the
    beginning of the same text.

    Raises:
        InputError: if the text is shorter than the probe, the models do not belong together, or
            the system is not Linux.
        CheckpointError: if a folder holds no checkpoint.
    """
    require_counts()
    models, tokenizer = _pair(checkpoint, reference)
    corpus, valid = load_split(data, "valid")
    warning = warning_of_other_text(models[0].config.training_text, data, corpus, "valid", valid)
    if warning is not None:
        warn(console, warning)
    text = encode(tokenizer, valid)
    if len(text) < _PROBE:
        raise InputError(
            f"the validation text has {len(text)} tokens, but the probe takes {_PROBE}; give more "
            "text"
        )
    probe = text[None, :_PROBE]
    states = [model.first_state() for model in models]
    ages, seen = [], 0
    with Plan({"read": length / 10_000}, console) as plan, plan.stage("read") as advance:
        for position in positions(length):
            for piece in _pieces(text, seen, position, MOST_A_CALL):
                states[1] = _read(models[1], piece, states[1])
                for some in piece.split(step, 1):
                    states[0] = _read(models[0], some, states[0])
                seen += piece.shape[1]
                advance(seen / length)
            ages.append(_measured(models, states, text, probe, position))
    protocol = {
        "checkpoint": str(checkpoint),
        "reference": str(reference),
        "corpus": corpus,
        "text_tokens": len(text),
        "probe_tokens": _PROBE,
        "step": step,
        "threads": torch.get_num_threads(),
    }
    return Stability(protocol, ages)


def _pair(
    checkpoint: Path, reference: Path
) -> tuple[tuple[ResNetBKForCausalLM, ResNetBKForCausalLM], PreTrainedTokenizerFast]:
    """The quantized model, its float reference, and the tokenizer of both."""
    (quantized, tokenizer), (exact, other) = map(load_checkpoint, (checkpoint, reference))
    if quantized.quantization_state is not QuantizationState.QUANTIZED:
        raise InputError(
            f"the model in {checkpoint} is {quantized.quantization_state.value}, not quantized; "
            "quantize it with bkcore quantize"
        )
    if exact.quantization_state is not QuantizationState.FLOAT:
        raise InputError(
            f"the reference in {reference} is not a float model; name the one that was quantized"
        )
    check_tokenizers(tokenizer, other, checkpoint, reference)
    return (quantized, exact), tokenizer


def positions(length: int) -> list[int]:
    """1,000, 10,000 and so on up to `length`, and `length` itself."""
    found = []
    position = FIRST_AGE
    while position < length:
        found.append(position)
        position *= 10
    return [*found, length]


def report(result: Stability) -> dict[str, Any]:
    """The JSON file, with divergences in nats and ratios for each layer."""
    return {"machine": machine(), **asdict(result)}


def table(ages: Sequence[Age]) -> Table:
    """A row for every age."""
    grid = Table(box=box.SIMPLE_HEAD, show_edge=False)
    for heading in ("tokens read", "KL, millinats", "±", "worst error / bound", "resident, MB"):
        grid.add_column(heading, justify="right")
    for age in ages:
        grid.add_row(
            f"{age.position:,}",
            f"{1e3 * age.kl:.3f}",
            f"{1e3 * age.standard_error:.3f}",
            f"{max(age.worst):.3f}",
            f"{age.resident_bytes / 1e6:,.0f}",
        )
    return grid


def divergence(reference: Tensor, logits: Tensor) -> tuple[float, float]:
    """Mean of KL(p || q) over the rows of two tensors of logits (N, V), and its standard error."""
    p, q = (x.double().log_softmax(-1) for x in (reference, logits))
    each = (p.exp() * (p - q)).sum(-1)
    return float(each.mean()), float(each.std() / len(each) ** 0.5)


def _measured(
    models: Sequence[ResNetBKForCausalLM],
    states: Sequence[StreamState],
    text: Tensor,
    probe: Tensor,
    position: int,
) -> Age:
    logits = [
        model(probe, cache_params=state).logits[0]
        for model, state in zip(models, states, strict=True)
    ]
    before = next(_pieces(text, max(position - _CERTIFIED, 0), position, _CERTIFIED))
    worst = tuple(
        # Where a bound is 0, so is the error; otherwise the certificate is wrong, and this is huge.
        float((c.error / c.bound.clamp(min=torch.finfo(torch.float64).tiny)).max())
        for c in core_certificates(models[0], before)
    )
    kl, error = divergence(logits[1], logits[0])
    return Age(position, kl, error, worst, resident_bytes())


def _read(model: ResNetBKForCausalLM, piece: Tensor, state: StreamState) -> StreamState:
    after: StreamState = model(piece, cache_params=state).cache_params
    return after


def _pieces(text: Tensor, start: int, end: int, step: int) -> Iterator[Tensor]:
    """Tokens `start` to `end` of a text that repeats itself, (1, at most `step`) each."""
    for first in range(start, end, step):
        places = torch.arange(first, min(first + step, end)) % len(text)
        yield text[None, places]
