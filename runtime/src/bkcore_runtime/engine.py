"""The engine: a model in its checkpoint folder reads tokens, without PyTorch."""

from __future__ import annotations

import itertools
import os
import threading
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from bkcore_runtime import manifest
from bkcore_runtime.arguments import (
    a_number,
    an_integer,
    array_of,
    integers,
    numpy_for,
    only_row,
    row_of_integers,
)
from bkcore_runtime.errors import (
    CheckpointError,
    DTypeError,
    InputError,
    ShapeError,
    UnsupportedError,
)
from bkcore_runtime.extension import _engine
from bkcore_runtime.host import MOST_THREADS, asked_threads, free_cores
from bkcore_runtime.reading import foreign, parse_json, shown

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Floats = npt.NDArray[np.float32]
    Integers = npt.NDArray[np.int64]

WEIGHTS = "model.safetensors"
"""The one file of weights that the engine reads."""

_SMALL = 64 << 20
"""Bytes of weights up to which one sequence gains little from a second thread."""

_ROWS_AT_ONCE = 4096
"""Tokens of a batch that are read before an interruption is noticed."""


class LayerState(NamedTuple):
    """What one layer remembers of a batch of B sequences, as `bkcore.model.state.LayerState` does.

    Attributes:
        taps: float32 (B, W - 1, C), the past inputs of the next convolutions of width W.
        g: float32 (B, H, 2), Re and Im of the last diagonal entry of the resolvent.
        psi: float32 (B, H, 2, K, U), Re and Im of the propagated source.
    """

    taps: Floats
    g: Floats
    psi: Floats


class State:
    """What a model remembers of a batch of sequences; `Engine.start` makes one.

    Its size does not depend on how much was read. Reading changes it.
    """

    def __init__(self, native: _engine.State) -> None:
        self._native = native
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """Sequences."""
        return self._native.batch

    @property
    def seen(self) -> Integers:
        """int64 (B,), number of tokens read: a copy."""
        numpy_for("seen")
        with self._lock:
            return self._native.seen().copy()

    @property
    def layers(self) -> tuple[LayerState, ...]:
        """What each layer remembers: copies."""
        numpy_for("layers")
        with self._lock:
            return tuple(
                LayerState(*(field.copy() for field in fields)) for fields in self._native.fields()
            )

    def copy(self) -> State:
        """A state that goes its own way from here."""
        with self._lock:
            return State(self._native.copy())

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file, completely or not at all; `Engine.load` reads it.

        It is the one of `bkcore.model.StreamState.save`, which can read it, too.

        Raises:
            CheckpointError: if it cannot be written.
        """
        with self._lock:
            self._native.save(_bytes(path))


class Engine:
    """A model that is read from a checkpoint folder and runs on CPUs.

    It reads float checkpoints and quantized ones, and computes what bkcore does with PyTorch. Any
    number of sequences, tokens and threads gives the same bits. An engine may be used by several
    threads of a program at once; they take turns. `generate` needs Python alone; what takes or
    gives arrays needs numpy.

    Args:
        folder: what `save_pretrained` wrote. The files are checked against the manifest, then
            mapped into memory: they must not be shortened while the engine lives.
        threads: to compute with, 1 to 1,024. By default 1 if the weights have at most 64 MiB, since
            one sequence of so small a model gains little from more; otherwise OMP_NUM_THREADS in
            the environment, or without it the cores that are idle now.
        isa: instruction set: "avx512", "avx2" or "baseline", on ARM "dotprod" or "baseline"; by
            default the best of this processor.
        digests: the result of `bkcore_runtime.manifest.read(folder)`, to read exactly those files
            or fail.

    Attributes:
        stop: ids of the tokens that end a text, as the checkpoint says; often none.

    Raises:
        InputError: if `threads` or `isa` is impossible.
        CheckpointError: if the checkpoint is missing, damaged, altered or not one of bkcore.
        UnsupportedError: if bkcore reads it and the engine does not: its mixer has no state, its
            quantization is not finished, its weights are float64 or in several files, or it has
            adapters.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        threads: int | None = None,
        isa: str | None = None,
        digests: manifest.Digests | None = None,
    ) -> None:
        if threads is not None and not 1 <= an_integer("threads", threads) <= MOST_THREADS:
            raise InputError(f"threads must be from 1 to {MOST_THREADS}, not {shown(threads)}")
        if isa is not None and isa not in _engine.isas():
            known = ", ".join(_engine.isas())
            raise InputError(f"isa must be one of {known} on this processor, not {shown(isa)}")
        folder = Path(folder)
        listed = manifest.read(folder) if digests is None else digests
        _check_files(folder, listed)
        names = manifest.CONFIG, WEIGHTS
        checked = {folder / name: manifest.check(folder, name, listed)[1] for name in names}
        if threads is None:
            is_small = checked[folder / WEIGHTS].st_size <= _SMALL
            threads = 1 if is_small else asked_threads() or free_cores()
        self._native = _engine.Engine(os.fsencode(folder), threads, isa or "")
        # By these names, which may be links, the engine has opened them.
        if not all(manifest.is_same(path, status) for path, status in checked.items()):
            raise CheckpointError(f"{folder} changed while it was being read; load it again")
        self.stop = _stop(folder, listed)

    @property
    def isa(self) -> str:
        """Instruction set that it computes with."""
        return self._native.isa

    @property
    def threads(self) -> int:
        """Threads that it computes with."""
        return self._native.threads

    @property
    def vocabulary(self) -> int:
        """Number of tokens it knows: V."""
        return self._native.vocabulary

    def __repr__(self) -> str:
        return f"<Engine: {self.vocabulary} tokens, {self.isa}, threads={self.threads}>"

    def start(self, batch: int = 1) -> State:
        """The state of `batch` sequences before their first token.

        Raises:
            InputError: if there are fewer than 1 or more than 2^20.
        """
        if not 1 <= an_integer("batch", batch) <= 1 << 20:
            raise InputError(f"a batch must have 1 to 2^20 sequences, not {shown(batch)}")
        return State(_engine.State(self._native, batch))

    def resume(self, layers: Sequence[Any], seen: npt.ArrayLike) -> State:
        """The state with these parts, which are copied.

        Args:
            layers: as in `State.layers`, or in `StreamState.layers` of bkcore: float32 on the CPU.
            seen: int64 (B,), number of tokens read, 0 to 2^62.

        Raises:
            ShapeError: if they are not those of a state of this model.
            DTypeError: if `layers` is no sequence, a part is not float32, or `seen` not of
                integers.
            InputError: if there are more than 2^20 sequences, or a number of tokens is above 2^62.
        """
        np = numpy_for("resume")
        if not isinstance(layers, Sequence):
            raise DTypeError(
                "layers must be a sequence of layers' states, such as State.layers, not "
                f"{type(layers).__name__}"
            )
        counts = integers(seen, "seen")
        if counts.ndim != 1 or not counts.size or counts.min() < 0:
            raise ShapeError(f"seen must be (B,), all at least 0, not {shown(seen)}")
        if counts.max() > 1 << 62:
            raise InputError(f"seen must be at most 2^62, not {counts.max()}")
        state = self.start(len(counts))
        places = state._native.fields()
        if len(layers) != len(places):
            raise ShapeError(f"the model has {len(places)} layers, not {len(layers)}")
        for number, (given, fields) in enumerate(zip(layers, places, strict=True)):
            parts = zip(LayerState._fields, _parts(given, number), fields, strict=True)
            for name, part, place in parts:
                part = array_of(part, f"{name} of layer {number}")
                if part.dtype != np.float32:
                    raise DTypeError(f"{name} of layer {number} must be float32, not {part.dtype}")
                if part.shape != place.shape:
                    raise ShapeError(
                        f"{name} of layer {number} must be {place.shape}, not {part.shape}"
                    )
                place[...] = part
        state._native.seen()[...] = counts
        return state

    def load(self, path: str | os.PathLike[str]) -> State:
        """Read what `State.save`, or `StreamState.save` of bkcore, wrote of such a model.

        Raises:
            CheckpointError: if the file is missing, damaged, or not a state of this model in
                float32.
        """
        return State(self._native.load_state(_bytes(path)))

    def read(self, state: State, tokens: npt.ArrayLike) -> Floats:
        """Read tokens, each sequence from where it stands, and predict the next one.

        An interruption of a long text leaves a state that has read the tokens it counts.

        Args:
            state: of B sequences; it is changed. If a token is refused, it stays as it is.
            tokens: integers (B, N) in [0, V), N >= 1.

        Returns:
            Logits, float32 (B, V), after the last tokens.

        Raises:
            ShapeError: if the shape is not that, or the state is one of another model.
            DTypeError: if tokens are not integers, or the state is none of an engine.
            InputError: if a token is none of the vocabulary.
            EngineError: if the system starts no more threads.
        """
        self._check_state(state)
        np = numpy_for("read")
        ids = integers(tokens, "tokens")
        if ids.ndim != 2 or len(ids) != len(state) or not ids.size:
            raise ShapeError(f"tokens must be ({len(state)}, N), N >= 1, not {ids.shape}")
        step = max(1, _ROWS_AT_ONCE // len(ids))
        last = (ids.shape[1] - 1) // step * step
        if last and (ids.min() < 0 or ids.max() >= self.vocabulary):
            self._refuse(ids.ravel().tolist())  # before a part is read
        with state._lock:
            for first in range(0, last, step):
                part = np.ascontiguousarray(ids[:, first : first + step])
                self._native.read(state._native, part, None)
            logits = np.empty((len(ids), self.vocabulary), np.float32)
            self._native.read(state._native, np.ascontiguousarray(ids[:, last:]), logits)
        return logits

    def generate(
        self,
        prompt_ids: npt.ArrayLike,
        max_new_tokens: int | None = None,
        *,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int = 0,
        stop: Sequence[int] | None = None,
        state: State | None = None,
    ) -> Iterator[int]:
        """Continue one sequence: yields token ids as they are made.

        The filters follow each other as in transformers: repetition penalty, temperature, top-k,
        top-p, min-p. The same seed gives the same tokens on every processor, as far as the logits
        are the same.

        Args:
            prompt_ids: integers (N,) in [0, V), N >= 1.
            max_new_tokens: the most to make, at least 1; None goes on until a token of `stop`.
            temperature: at least 0; 0 takes the likeliest token.
            top_k: how many of the likeliest tokens to keep; 0 keeps all.
            top_p: 0 to 1, keeps the likeliest tokens that have this probability together.
            min_p: 0 to 1, keeps tokens at least this many times as likely as the likeliest one.
            repetition_penalty: above 0; divides the positive logits of tokens that were read or
                made, and multiplies their negative ones.
            seed: of the draws, any integer; it counts modulo 2^64.
            stop: ids that end the sequence, which are yielded, too; None takes those of the
                checkpoint, `Engine.stop`.
            state: of one sequence, to continue; it is changed. Whenever a token is yielded, the
                state has read everything before that token.

        Raises:
            ShapeError: if `prompt_ids` is not that, or the state is of more sequences, or of
                another model.
            DTypeError: if ids are not integers, or the state is none of an engine.
            InputError: if another argument is out of its range.
            EngineError: while it runs, if the model gives logits that are NaN or infinite, or the
                system starts no more threads.
        """
        ids = row_of_integers(prompt_ids, "prompt_ids")
        if min(ids) < 0 or max(ids) >= self.vocabulary:
            self._refuse(ids)
        state = self.start() if state is None else state
        self._check_state(state)
        if len(state) != 1:
            raise ShapeError(f"generate continues one sequence, not {len(state)}")
        if max_new_tokens is not None and an_integer("max_new_tokens", max_new_tokens) < 1:
            raise InputError(f"max_new_tokens must be at least 1, not {shown(max_new_tokens)}")
        ends = self.stop if stop is None else _stops(stop, self.vocabulary)
        sampler = _engine.Sampler(
            self.vocabulary,
            an_integer("seed", seed) % 2**64,
            a_number("temperature", temperature),
            max(-1, min(an_integer("top_k", top_k), self.vocabulary)),
            a_number("top_p", top_p),
            a_number("min_p", min_p),
            a_number("repetition_penalty", repetition_penalty),
        )
        sampler.see(ids)
        return self._tokens(state, ids, sampler, max_new_tokens, frozenset(ends))

    def _tokens(
        self,
        state: State,
        prompt: array[int],
        sampler: _engine.Sampler,
        most: int | None,
        ends: frozenset[int],
    ) -> Iterator[int]:
        last = (len(prompt) - 1) // _ROWS_AT_ONCE * _ROWS_AT_ONCE
        with state._lock:
            for first in range(0, last, _ROWS_AT_ONCE):
                self._native.read(
                    state._native, only_row(prompt[first : first + _ROWS_AT_ONCE]), None
                )
        unread = prompt[last:]
        for number in itertools.count(1):
            with state._lock:
                token = self._native.next(state._native, only_row(unread), sampler)
            yield token
            if token in ends or number == most:
                return
            unread = array("q", (token,))

    def _check_state(self, state: State) -> None:
        if not isinstance(state, State):
            raise DTypeError(
                f"the state must be one that Engine.start made, not {type(state).__name__}; "
                "Engine.resume(state.layers, state.seen) makes one of a StreamState"
            )
        try:
            self._native.check_fits(state._native)
        except InputError as error:
            raise ShapeError(str(error)) from error

    def _refuse(self, ids: Iterable[int]) -> NoReturn:
        """Raise for the first token that is none of the vocabulary."""
        wrong = next(each for each in ids if not 0 <= each < self.vocabulary)
        raise InputError(f"token {wrong} is not in [0, {self.vocabulary})")


def _parts(layer: Any, number: int) -> Sequence[object]:
    """The fields of a layer's state, by name or else by position."""
    names = LayerState._fields
    if all(hasattr(layer, name) for name in names):
        return [getattr(layer, name) for name in names]
    if isinstance(layer, list | tuple) and len(layer) == len(names):
        return layer
    raise ShapeError(f"layer {number} must have taps, g and psi, not {shown(layer)}")


def _check_files(folder: Path, digests: manifest.Digests) -> None:
    """Raise `UnsupportedError` unless the weights are in one file, all of them."""
    weights = sorted(filter(manifest.is_weights_file, digests))
    if weights != [WEIGHTS]:
        raise UnsupportedError(
            f"the engine does not read {folder}: its weights are in {', '.join(weights)}, not in "
            f"{WEIGHTS}"
        )
    if os.path.lexists(folder / "adapter_config.json"):
        raise UnsupportedError(
            f"the engine does not read {folder}: it holds adapters (adapter_config.json)"
        )


def _stop(folder: Path, digests: manifest.Digests) -> tuple[int, ...]:
    """`eos_token_id` of the generation configuration, or of the model's if there is none."""
    name = manifest.GENERATION if manifest.GENERATION in digests else manifest.CONFIG
    with foreign(str(folder / name)):
        fields = parse_json(manifest.contents(folder, name, digests))
        ids = fields.get("eos_token_id")
        if ids is None:
            return ()
        given = ids if isinstance(ids, list) else [ids]
        if not all(type(each) is int for each in given):
            raise CheckpointError(f"eos_token_id in {folder / name} cannot be {shown(ids)}")
        return tuple(given)


def _stops(stop: Sequence[int], vocabulary: int) -> tuple[int, ...]:
    """Ids that end a text, checked."""
    try:
        ids = tuple(an_integer("an id of stop", each) for each in stop)
    except TypeError as error:
        raise InputError(f"stop must be a sequence of token ids, not {shown(stop)}") from error
    for each in ids:
        if not 0 <= each < vocabulary:
            raise InputError(f"stop token {shown(each)} is not in [0, {vocabulary})")
    return ids


def _bytes(path: str | os.PathLike[str]) -> bytes:
    """A path for the system, which would take one with a zero for a shorter one."""
    name = os.fsencode(path)
    if b"\0" in name:
        raise CheckpointError(f"there is no file {shown(str(path))}")
    return name
