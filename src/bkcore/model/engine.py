"""One token of every sequence by the native engine, without PyTorch in between.

The engine (`bkcore_runtime`) reads a model's own tensors where they are, and gives the same bits as
the model's modules do one by one. It takes over where nothing can be lost: on a CPU, in float32,
without gradients, hooks, adapters or counts of the experts' load. Otherwise the modules run.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from bkcore.errors import BackendError, BKCoreError, InputError, ShapeError
from bkcore.kernels.backends.cpu.native import isa
from bkcore.kernels.backends.selection import current_choice
from bkcore.model import meddling
from bkcore.model.core_quantizers import CoreQuantizers
from bkcore.model.layers import TokenEmbedding
from bkcore.model.mixer import ResolventMixer
from bkcore.model.moe import MixtureOfExperts
from bkcore.model.state import LayerState, StreamState
from bkcore.model.watchers import watcher
from bkcore_runtime.extension import _engine as native

CHOICES = ("auto", "always", "never")
_VARIABLE = "BKCORE_ENGINE"
_environment = os.environ.get(_VARIABLE) or "auto"
_choice: ContextVar[str | None] = ContextVar("bkcore_engine", default=None)

_DTYPES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.int64: "I64",
}
"""Their names in safetensors, which the engine goes by."""

_EXCHANGE = getattr(Tensor, "__dlpack_c_exchange_api__", None)
"""By which the native snapshot looks at tensors; older versions of PyTorch have none."""

_INNER = {"_modules", "_parameters", "_buffers", "_forward_hooks", "_forward_pre_hooks"}
"""Dictionaries of a module that belong to what it computes."""


@contextlib.contextmanager
def use_engine(choice: str) -> Iterator[None]:
    """Say whether the engine reads single tokens, inside a with block.

    It overrides the environment variable BKCORE_ENGINE, which is read at import. It concerns calls
    of a model with one token for each sequence; longer texts go through the modules.

    Args:
        choice: "auto" where it can, "never", or "always": then a call with one token that it cannot
            take raises.

    Raises:
        BackendError: if the choice is unknown.
    """
    token = _choice.set(_known(choice))
    try:
        yield
    finally:
        _choice.reset(token)


def _known(choice: str, source: str = "") -> str:
    if choice not in CHOICES:
        raise BackendError(
            f"{source}there is no choice {choice!r} of the engine; it is one of {CHOICES}"
        )
    return choice


def step(
    model: nn.Module, input_ids: Tensor, state: StreamState | None, objection: str | None = None
) -> tuple[Tensor, StreamState] | None:
    """Read a token of every sequence, if the engine can.

    Args:
        model: a language model.
        input_ids: (B, 1).
        state: what the sequences read before, which is not changed; None only with an objection.
        objection: why the engine must not read them, whatever the model; None if it may.

    Returns:
        Logits float32 (B, 1, V), and the new state; None if the modules must read the tokens.

    Raises:
        BackendError: if the engine is to be used always, and cannot.
        IndexError: if a token is not in the vocabulary.
        ShapeError: if the state is that of another model.
    """
    if objection is not None and torch.compiler.is_compiling():
        return None  # a graph cannot look at context variables
    choice = _choice.get() or _known(_environment, f"{_VARIABLE} is set, but ")
    if choice == "never":
        return None
    reason = objection or _unfit_tokens(input_ids, state)
    if reason is None and state is not None:
        bound, tensors = _binding(model)
        reason = bound.refusal_now()
        if reason is None:
            return bound.step(model, input_ids.contiguous(), state, tensors)
    if choice == "always":
        raise BackendError(f"the engine was requested, but cannot be used: {reason}")
    return None


def _unfit_tokens(input_ids: Tensor, state: StreamState | None) -> str | None:
    """What there is against these tokens, whatever the model."""
    if current_choice() not in ("auto", "cpu"):
        return f"the backend {current_choice()} is forced"
    if (reason := watcher()) is not None:
        return reason
    if (reason := _unreadable("the tensor of tokens", input_ids)) is not None:
        return reason
    if input_ids.dtype != torch.int64:
        return f"the tokens are {input_ids.dtype}, not int64"
    for layer in () if state is None else state.layers:
        for x in _fields(layer):
            if (reason := _unreadable("the state", x)) is not None:
                return reason
            if x.dtype != torch.float32:
                return f"the state is {x.dtype}, not float32; begin with that of a float32 model"
    return None


def _unreadable(name: str, x: Tensor) -> str | None:
    """Why the numbers of x are not simply what is in this machine's memory; None if they are."""
    if type(x) not in (Tensor, nn.Parameter):
        return f"{name} is a {type(x).__qualname__}, not a plain tensor"
    if not x.is_cpu:
        return f'{name} is on {x.device}, not on the CPU; move it with to("cpu")'
    if x.layout != torch.strided:
        return f"{name} is stored as {x.layout}; convert it with to_dense()"
    if x.is_neg():
        return f"{name} is a negated view of other numbers; use resolve_neg()"
    return None


def _binding(model: nn.Module) -> tuple[_Bound, list[Tensor]]:
    """The engine of a model as it is now, and the tensors that it reads."""
    bound = _bound.get(model)
    tensors = None if bound is None else bound.hold()
    if bound is None or tensors is None:
        tensors = [*model.parameters(), *model.buffers()]
        bound = _bound[model] = _Bound(model)
    return bound, tensors


def _unfit(model: nn.Module) -> str | None:
    """What there is against a model whose modules are the usual ones."""
    modules = list(model.modules())
    experts = [m for m in modules if isinstance(m, MixtureOfExperts)]
    quantizers = [m for m in modules if isinstance(m, CoreQuantizers)]
    reasons = {
        "it is in training mode; call eval()": any(m.training for m in modules),
        "tokens are counted by expert": any(
            m.load is not None or m.calibration_load is not None for m in experts
        ),
        "its quantizers observe or learn": not all(m.rounds_only for m in quantizers),
    }
    return next((reason for reason, found in reasons.items() if found), None)


class _Bound:
    """An engine for a model's tensors, or why there is none; and whether that still holds.

    It keeps nothing of the model alive.
    """

    def __init__(self, model: Any) -> None:
        objects = [*model.modules(), model.config, *meddling.classes(model)]
        self.snapshot = native.Snapshot(objects, Tensor, _EXCHANGE, _INNER)
        self.layouts = self._layouts(self.snapshot.hold() or [])
        self.facts = _facts()
        self.has_floats = any(type(m) in (nn.Linear, TokenEmbedding) for m in model.modules())
        self.refusal = meddling.meddled(model) or _unfit(model) or self._open(model)
        if self.refusal is None:
            first = model.first_state(1).layers
            self.layers = len(first)
            self.sizes = [tuple(x.shape[1:]) for x in _fields(first[0])]

    def hold(self) -> list[Tensor] | None:
        """The model's tensors if it is as it was. Every token asks, so this takes little Python."""
        tensors: list[Tensor] | None = self.snapshot.hold()
        if tensors is None or self.facts != _facts() or self.layouts != self._layouts(tensors):
            return None
        return tensors if self.refusal is not None or self.engine.is_current() else None

    def refusal_now(self) -> str | None:
        """Why the engine cannot take the model, if so."""
        if self.refusal is None and self.has_floats and torch.is_autocast_enabled("cpu"):
            return "autocast is on, and would round the products of a float model"
        return self.refusal

    def _layouts(self, tensors: list[Tensor]) -> list[object]:
        """Where tensors are and how their numbers lie, as far as the snapshot does not look."""
        if self.snapshot.sees_layouts:
            return []
        dense = (x for x in tensors if x.layout == torch.strided)
        return [(x.data_ptr(), x.dtype, x.shape, x.stride()) for x in dense]

    def _open(self, model: Any) -> str | None:
        """Set up the engine; or return why it cannot be."""
        tensors = {}
        try:
            named = model.state_dict(keep_vars=True)
        except RecursionError:
            return "its modules contain each other"
        for name, x in named.items():
            if (reason := _unreadable(name, x) or _odd(name, x)) is not None:
                return reason
            tensors[name] = _DTYPES[x.dtype], list(x.shape), x.data_ptr()
        threads = torch.get_num_threads()
        try:
            config = json.dumps(model.config.to_dict(), default=str, allow_nan=False)
            self.engine = native.Engine.of_tensors(tensors, config, threads, isa())
            return meddling.misfit(model, config)
        except (BKCoreError, ValueError) as error:
            return str(error)

    def step(
        self, model: Any, input_ids: Tensor, state: StreamState, tensors: list[Tensor]
    ) -> tuple[Tensor, StreamState]:
        """Read tokens (B, 1); `tensors` are the model's, which so live until they are read."""
        batch = len(input_ids)
        expected = [(batch, *size) for size in self.sizes]
        before, after = [], []
        for layer in state.layers:
            fields = _fields(layer)
            if [x.shape for x in fields] != expected:
                raise _misfit(model, layer, batch)
            before.append([x if x.is_contiguous() else x.contiguous() for x in fields])
            after.append(list(map(torch.empty_like, before[-1])))
        if len(before) != self.layers:
            raise ShapeError(
                f"the state has {len(before)} layers, but the model has {self.layers}; it is the "
                "state of another model"
            )
        logits = torch.empty((batch, 1, self.engine.vocabulary), dtype=torch.float32, device="cpu")
        pairs = zip(before, after, strict=True)
        addresses = [tuple(x.data_ptr() for x in (*b, *a)) for b, a in pairs]
        try:
            self.engine.read_at(batch, 1, input_ids.data_ptr(), addresses, logits.data_ptr())
        except InputError as error:
            raise IndexError(str(error)) from error
        layers = tuple(LayerState(*fields) for fields in after)
        return logits, StreamState(layers, state.seen + 1)


def _fields(layer: LayerState) -> tuple[Tensor, Tensor, Tensor]:
    return layer.taps, layer.g, layer.psi


def _misfit(model: nn.Module, layer: LayerState, batch: int) -> ShapeError:
    """What is wrong with the shapes of a layer's state."""
    for mixer in model.modules():
        if isinstance(mixer, ResolventMixer):
            mixer.check_state(layer)
    return ShapeError(
        f"a layer's state has {[len(x) for x in _fields(layer)]} sequences in taps, g and psi, but "
        f"input_ids has {batch}"
    )


def _facts() -> tuple[object, ...]:
    """What an engine is made for, beside the model."""
    return isa(), torch.get_num_threads()


def _odd(name: str, x: Tensor) -> str | None:
    """Why the engine does not read a tensor of a model that is in this machine's memory."""
    if x.dtype not in _DTYPES or (isinstance(x, nn.Parameter) and x.dtype != torch.float32):
        return f"{name} is {x.dtype}, and the engine computes in float32; convert it with float()"
    if not x.is_contiguous():
        return (
            f"{name} is {tuple(x.shape)} with strides {x.stride()}, not row by row; copy it with "
            "contiguous()"
        )
    return None


_bound: WeakKeyDictionary[nn.Module, _Bound] = WeakKeyDictionary()
