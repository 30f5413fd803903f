"""Timing of engines: what is timed of ours and of llama.cpp, in alternation with plain reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from transformers import LlamaConfig

from bkcore.bench.engine_costs import Cost, Pass, llama_cost, own_cost, plain_read
from bkcore.bench.engine_rows import Side
from bkcore.bench.llama_cpp_engine import LlamaCpp
from bkcore.bench.own_engine import OwnEngine, Text, Tokens
from bkcore.bench.timing import Call, interleaved
from bkcore.host import torch_threads
from bkcore.model import ResNetBKForCausalLM

STEPS = 32
"""Tokens that a timed call writes."""

READ = 512
"""Tokens that a timed call reads."""


@dataclass(frozen=True)
class Timed:
    """Something to time.

    Attributes:
        engine, parameters, note: as in `Side`.
        call: makes some passes through a model.
        work: one of them.
        cost: what it needs.
        passes: how many the call makes.
    """

    engine: str
    parameters: int
    call: Call
    work: Pass
    cost: Cost
    passes: int
    note: str = ""

    def side(self, seconds: float, plain_read_seconds: float) -> Side:
        """Its times, from seconds of the call and of a plain read of the bytes of a pass."""
        tokens = self.work.sequences * self.work.tokens
        return Side(
            engine=self.engine,
            parameters=self.parameters,
            seconds=seconds / (self.passes * tokens),
            bytes=self.cost.bytes / tokens,
            operations=self.cost.operations / tokens,
            plain_read_seconds=plain_read_seconds / tokens,
            note=self.note,
        )


def time_together(timed: Sequence[Timed], threads: int) -> list[Side]:
    """Time all of them in alternation, and beside each a plain read on as many threads."""
    calls = [each.call for each in timed]
    reads = [plain_read(each.cost.bytes) for each in timed]
    with torch_threads(threads):
        seconds = interleaved(*calls, *reads)
    halves = zip(timed, seconds[: len(timed)], seconds[len(timed) :], strict=True)
    return [each.side(own, read) for each, own, read in halves]


@dataclass(frozen=True)
class OwnModel:
    """A model of ours in one format.

    Attributes:
        name: size and kind.
        format: such as "INT8".
        model: the same model as the engines run, to count its costs.
        parameters: of the float model.
        engines: by their number of threads.
    """

    name: str
    format: str
    model: ResNetBKForCausalLM
    parameters: int
    engines: dict[int, OwnEngine]

    def text(self, threads: int, context: int, sequences: int = 1) -> Text:
        """Sequences of `context` random tokens, all of which are read."""
        engine = self.engines[threads]
        text = engine.start(sequences)
        if context:
            engine.read(text, random_tokens(self.model.config.vocab_size, sequences, context))
        return text

    def decode(self, text: Text, threads: int, work: Pass, engine: str = "") -> Timed:
        """Continue a text, again and again: it does not end where it began."""
        first = random_tokens(self.model.config.vocab_size, work.sequences, 1)[:, 0]
        call = partial(self.engines[threads].greedy, text, first, STEPS)
        return self._timed(call, work, STEPS, engine)

    def read(self, text: Text, threads: int, context: int) -> Timed:
        """Read more of a text, again and again."""
        tokens = random_tokens(self.model.config.vocab_size, 1, READ)
        call = partial(self.engines[threads].read, text, tokens)
        return self._timed(call, Pass(context, tokens=READ), 1)

    def _timed(self, call: Call, work: Pass, passes: int, engine: str = "") -> Timed:
        name = engine or f"bkcore {self.format}"
        return Timed(name, self.parameters, call, work, own_cost(self.model, work), passes)


@dataclass(frozen=True)
class Rival:
    """llama.cpp in one format, which reads one text.

    Attributes:
        format: such as "Q8_0".
        config: of its model.
        parameters: of its model.
        weight_bytes: of its file's tensors.
        engine: llama.cpp.
        note: how it is set.
    """

    format: str
    config: LlamaConfig
    parameters: int
    weight_bytes: int
    engine: LlamaCpp
    note: str

    def read_to(self, context: int, threads: int) -> None:
        """Read random tokens until there are `context`."""
        self.engine.use_threads(threads)
        missing = context - self.engine.position
        if missing:
            self.engine.read(random_tokens(self.config.vocab_size, 1, missing)[0])

    def decode(self, threads: int) -> Timed:
        """Continue the text, and cut it again."""
        first = int(random_tokens(self.config.vocab_size, 1, 1)[0, 0])
        call = partial(self.engine.greedy, first, STEPS)
        return self._timed(call, threads, Pass(self.engine.position), STEPS)

    def read(self, threads: int) -> Timed:
        """Read more of the text, and cut it again."""
        tokens = random_tokens(self.config.vocab_size, 1, READ)[0]
        call = partial(self.engine.read, tokens)
        return self._timed(call, threads, Pass(self.engine.position, tokens=READ), 1)

    def _timed(self, call: Call, threads: int, work: Pass, passes: int) -> Timed:
        def call_and_cut() -> None:
            call()
            self.engine.forget(work.context)

        self.engine.use_threads(threads)
        cost = llama_cost(self.config, self.weight_bytes, work)
        name = f"llama.cpp {self.format}"
        return Timed(name, self.parameters, call_and_cut, work, cost, passes, self.note)


def random_tokens(vocab_size: int, sequences: int, count: int) -> Tokens:
    """The same tokens (B, N) at every call."""
    return np.random.default_rng(0).integers(vocab_size, size=(sequences, count))
