"""The cases of `bkcore bench engines`: bkcore and llama.cpp, on models with as many parameters.

Both are called token by token, and each token's argmax belongs to its time: for one sequence of
ours it is taken in C++, for llama.cpp by numpy. Before a model is timed, its logits are compared:
ours with those of a whole text, llama.cpp's with those of transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.console import Console
from transformers import LlamaForCausalLM

from bkcore.bench.engine_costs import Pass, active_parameters, state_bytes
from bkcore.bench.engine_models import (
    FORMATS,
    SIZES,
    Format,
    Size,
    in_format,
    llama_of_size,
    own_model,
)
from bkcore.bench.engine_rows import Row
from bkcore.bench.engine_timing import READ, STEPS, OwnModel, Rival, random_tokens, time_together
from bkcore.bench.inference import check_products
from bkcore.bench.llama_cpp_engine import (
    LlamaCpp,
    check_close,
    check_engine,
    check_llama_cpp,
    describe,
    require_llama_cpp,
    write_gguf,
)
from bkcore.bench.machine import machine
from bkcore.bench.own_engine import OwnEngine
from bkcore.bench.rival_models import count_parameters
from bkcore.display.progress import Plan
from bkcore.errors import BenchmarkError, InputError
from bkcore.model import ResNetBKForCausalLM

CONTEXTS = (0, 512, 4096, 16_384)
TOGETHER = 64
YOUNG, OLD = 1_000, 1_000_000
AGED = ("4.9 M shipped", "INT8")
"""The model that is timed late in a text, too."""

_CALIBRATION = (4, 128)
_CHECKED = 24


@dataclass
class Findings:
    """What was measured.

    Attributes:
        rows: the times.
        models: what each model is.
        rival: the version of llama.cpp; None if it was left out.
    """

    rows: list[Row] = field(default_factory=list)
    models: list[dict[str, Any]] = field(default_factory=list)
    rival: dict[str, str] | None = None

    def as_dict(self) -> dict[str, Any]:
        """The JSON file."""
        return {
            "machine": machine(),
            "rival": self.rival,
            "tokens_a_call": {"decode": STEPS, "read": READ, "together": TOGETHER * STEPS},
            "models": self.models,
            "rows": [row.as_dict() for row in self.rows],
        }


def run_engines(
    console: Console, checkpoint: Path, only: str = "", with_rival: bool = True
) -> Findings:
    """Time the sizes whose names start with `only`, with progress on the console.

    Raises:
        InputError: if no size has such a name, or llama.cpp is not installed.
        BenchmarkError: if logits are wrong.
        CheckpointError: if the checkpoint is missing or damaged.
    """
    sizes = [size for size in SIZES if size.name.startswith(only)]
    if not sizes:
        known = ", ".join(size.name for size in SIZES)
        raise InputError(f"no size starts with {only!r}; the sizes are {known}")
    if with_rival:
        require_llama_cpp()
    found = Findings()
    with (
        Plan({size.name: size.seconds for size in sizes}, console) as plan,
        TemporaryDirectory() as place,
    ):
        if with_rival:
            check_llama_cpp()
            found.rival = describe()
        for size in sizes:
            with plan.stage(size.name) as advance:
                _measure_size(size, checkpoint, Path(place), found, advance)
    return found


def _measure_size(
    size: Size, checkpoint: Path, folder: Path, found: Findings, advance: Callable[[float], object]
) -> None:
    models = {
        f"{size.name} {kind}": own_model(options, checkpoint) for kind, options in size.own.items()
    }
    found.models += [_described(name, model) for name, model in models.items()]
    llama = None
    if found.rival is not None:
        first = next(iter(models.values()))
        llama = llama_of_size(size.llama, first.config.vocab_size, count_parameters(first))
        found.models.append(_described_llama(f"{size.name} Llama", llama))
    counts = sorted({1, min(2, torch.get_num_threads())})
    expected = len(FORMATS) * len(models) * len(counts) * (2 * len(CONTEXTS) + 1)
    rows: list[Row] = []
    for form in FORMATS:
        for row in _measure_format(form, models, llama, folder, counts):
            rows.append(row)
            advance(min(1.0, len(rows) / expected))
    found.rows += sorted(rows, key=lambda row: list(models).index(row.model))


def _measure_format(
    form: Format,
    models: dict[str, ResNetBKForCausalLM],
    llama: LlamaForCausalLM | None,
    folder: Path,
    counts: Sequence[int],
) -> Iterator[Row]:
    with TemporaryDirectory(dir=folder) as place, ExitStack() as stack:
        owns = [
            _saved(name, form, model, Path(place) / name, counts) for name, model in models.items()
        ]
        rivals = []
        if llama is not None and form.rival is not None:
            rivals = _rivals(form.rival, llama, Path(place), stack)
        for context in CONTEXTS:
            for rival in rivals:
                rival.read_to(context, counts[-1])
            for threads in counts:
                yield from _compare(owns, rivals, context, threads)
        for own in owns:
            yield from (_together(own, threads) for threads in counts)
            if (own.name, own.format) == AGED:
                yield _late(own)


def _compare(
    owns: Sequence[OwnModel], rivals: Sequence[Rival], context: int, threads: int
) -> Iterator[Row]:
    """One token after another, and a piece of text, behind as much text; llama.cpp with and
    without flash attention, of which the faster counts."""
    texts = [own.text(threads, context) for own in owns]
    pairs = list(zip(owns, texts, strict=True))
    works = {
        "decode": [
            *(own.decode(text, threads, Pass(context)) for own, text in pairs),
            *(rival.decode(threads) for rival in rivals),
        ],
        "read": [
            *(own.read(text, threads, context) for own, text in pairs),
            *(rival.read(threads) for rival in rivals),
        ],
    }
    for work, timed in works.items():
        sides = time_together(timed, threads)
        best = min(sides[len(owns) :], key=lambda side: side.seconds, default=None)
        for own, side in zip(owns, sides, strict=False):
            yield Row(own.name, own.format, work, context, threads, side, best)


def _together(own: OwnModel, threads: int) -> Row:
    """A batch of sequences, against one."""
    many, one = time_together(
        [
            own.decode(own.text(threads, 0, count), threads, Pass(0, count), f"{count} sequences")
            for count in (TOGETHER, 1)
        ],
        threads,
    )
    return Row(own.name, own.format, "together", 0, threads, many, one)


def _late(own: OwnModel) -> Row:
    """A token of an old text, all of which was read, against one of a young text."""
    old, young = time_together(
        [
            own.decode(own.text(1, context), 1, Pass(context), f"at {context:,}")
            for context in (OLD, YOUNG)
        ],
        threads=1,
    )
    return Row(own.name, own.format, "late", OLD, 1, old, young)


def _saved(
    name: str, form: Format, model: ResNetBKForCausalLM, folder: Path, counts: Sequence[int]
) -> OwnModel:
    """A model in a format: saved, loaded and checked."""
    vocab_size = model.config.vocab_size
    samples = torch.from_numpy(random_tokens(vocab_size, *_CALIBRATION))
    coded = in_format(model, form, samples)
    check_products(coded)
    coded.save_pretrained(folder)
    engines = {count: OwnEngine(folder, count) for count in counts}
    for engine in engines.values():
        _check(engine, coded, name)
    return OwnModel(name, form.own, coded, count_parameters(model), engines)


@torch.inference_mode()
def _check(engine: OwnEngine, model: ResNetBKForCausalLM, name: str) -> None:
    """Compare the logits of tokens that were read one by one with those of the whole text."""
    tokens = random_tokens(model.config.vocab_size, 1, _CHECKED)
    expected = model(torch.from_numpy(tokens)).logits[0].numpy()
    text = engine.start()
    for place in range(_CHECKED - 1):
        found = engine.read(text, tokens[:, place : place + 1])
        what = f"the logits of {name} after token {place} differ from those of the whole text"
        check_close(found[0], expected[place], 1e-3, what)
    (written,) = engine.greedy(text, tokens[:, -1], 1)[0]
    if written != expected[-1].argmax():
        raise BenchmarkError(f"{name} does not write its likeliest token")


def _rivals(form: str, llama: LlamaForCausalLM, folder: Path, stack: ExitStack) -> list[Rival]:
    """llama.cpp without and with flash attention."""
    path = folder / "llama.gguf"
    size = write_gguf(llama, path, form)
    rivals = []
    for flash in (False, True):
        engine = LlamaCpp(path, max(CONTEXTS) + READ, flash)
        stack.enter_context(closing(engine))
        check_engine(engine, llama, form)
        note = (
            f"flash attention {'on' if flash else 'off'}; a decoded token's time includes "
            f"{1e6 * engine.loop_seconds():.1f} us of Python"
        )
        rivals.append(Rival(form, llama.config, count_parameters(llama), size, engine, note))
    return rivals


def _described(name: str, model: ResNetBKForCausalLM) -> dict[str, Any]:
    sizes = (
        *("vocab_size", "d_model", "n_layers", "num_experts", "experts_per_token", "expert_size"),
        *("num_heads", "key_groups", "key_size", "value_size"),
    )
    return {
        "name": name,
        "parameters": count_parameters(model),
        "active_parameters": active_parameters(model),
        "state_bytes": state_bytes(model),
        **{size: getattr(model.config, size) for size in sizes},
    }


def _described_llama(name: str, model: LlamaForCausalLM) -> dict[str, Any]:
    sizes = (
        *("vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size"),
        *("num_attention_heads", "num_key_value_heads"),
    )
    return {
        "name": name,
        "parameters": count_parameters(model),
        **{size: getattr(model.config, size) for size in sizes},
    }
