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
from torch.nn.modules.module import _has_any_global_hook

from bkcore.errors import BackendError, BKCoreError, InputError, ShapeError
from bkcore.kernels.backends.cpu.native import isa
from bkcore.kernels.backends.selection import current_choice
from bkcore.model.config import ResNetBKConfig
from bkcore.model.core_quantizers import CoreQuantizers
from bkcore.model.functions import RMSNorm, Router, ShortConvolution
from bkcore.model.layers import ResNetBKLayer, TokenEmbedding
from bkcore.model.mixer import Features, ResolventMixer
from bkcore.model.moe import Expert, MixtureOfExperts
from bkcore.model.state import LayerState, StreamState
from bkcore.quantization.complex_quantizer import ComplexQuantizer
from bkcore.quantization.levels import LevelTable
from bkcore.quantization.linear import QuantizedEmbedding, QuantizedLinear
from bkcore.quantization.quantizers import GroupWiseQuantizer
from bkcore.quantization.weights import HalfWeight, PackedWeight
from bkcore_runtime import _engine as native

CHOICES = ("auto", "always", "never")
_environment = os.environ.get("BKCORE_ENGINE") or "auto"
_choice: ContextVar[str | None] = ContextVar("bkcore_engine", default=None)

_PARTS = {
    *(nn.ModuleList, nn.Dropout, nn.Linear, TokenEmbedding, ResNetBKLayer, RMSNorm, Router),
    *(ShortConvolution, ResolventMixer, Features, MixtureOfExperts, Expert),
    *(QuantizedEmbedding, QuantizedLinear, PackedWeight, HalfWeight, CoreQuantizers),
    *(ComplexQuantizer, GroupWiseQuantizer, LevelTable),
}
"""Modules that the engine knows; any other class may compute something else."""

_DTYPES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.int64: "I64",
}
"""Their names in safetensors, which the engine goes by."""


@contextlib.contextmanager
def use_engine(choice: str) -> Iterator[None]:
    """Say whether the engine generates tokens, inside a with block.

    It overrides the environment variable BKCORE_ENGINE, which is read at import.

    Args:
        choice: "auto" where it can, "never", or "always": then a model that it cannot take raises.

    Raises:
        BackendError: if the choice is unknown.
    """
    token = _choice.set(_known(choice))
    try:
        yield
    finally:
        _choice.reset(token)


def _known(choice: str) -> str:
    if choice not in CHOICES:
        raise BackendError(f"there is no choice {choice!r} of the engine; it is one of {CHOICES}")
    return choice


def step(model: nn.Module, input_ids: Tensor, state: StreamState) -> tuple[Tensor, StreamState]:
    """Read a token of every sequence.

    Args:
        model: a model for which `refusal` found nothing.
        input_ids: int64 (B, 1), in the vocabulary.
        state: what the sequences read before, which is not changed.

    Returns:
        Logits float32 (B, 1, V), and the new state.

    Raises:
        IndexError: if a token is not in the vocabulary.
        ShapeError: if the state is that of another model.
    """
    return _bound[model].step(input_ids.contiguous(), state)


def refusal(model: nn.Module, input_ids: Tensor, state: StreamState) -> str | None:
    """Why the engine will not read these tokens (B, 1) with this model; None if it will.

    Raises:
        BackendError: if the engine is to be used always, and this is why it cannot.
    """
    choice = _choice.get() or _known(_environment)
    if choice == "never":
        return "it is turned off"
    reason = _unfit_tokens(input_ids, state) or _bind(model)
    if reason is not None and choice == "always":
        raise BackendError(f"the engine was requested, but cannot be used: {reason}")
    return reason


def _unfit_tokens(input_ids: Tensor, state: StreamState) -> str | None:
    """What there is against these tokens, whatever the model."""
    if current_choice() not in ("auto", "cpu"):
        return f"the backend {current_choice()} is forced"
    if type(input_ids) is not Tensor or not input_ids.is_cpu:
        return "the tokens are not on the CPU"
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return "PyTorch traces, compiles or watches the model"
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "a transform of torch.func is at work"
    if torch._C._get_tracing_state() is not None:
        return "PyTorch traces the model"
    for layer in state.layers:
        for x in (layer.taps, layer.g, layer.psi):
            if x.dtype != torch.float32 or not _is_plain(x):
                return f"the state is {x.dtype} on {x.device}, not float32 on the CPU"
    return None


def _is_plain(x: Tensor) -> bool:
    """Whether the numbers of x are what is in its memory."""
    return type(x) in (Tensor, nn.Parameter) and x.is_cpu and not x.is_neg()


def _bind(model: nn.Module) -> str | None:
    bound = _bound.get(model)
    if bound is None or not bound.holds():
        _bound.pop(model, None)
        if (reason := _meddled(model)) is not None:
            return reason  # without a binding: what meddles often refers to the model
        bound = _bound[model] = _Bound(model)
    return bound.refusal


def _meddled(model: nn.Module) -> str | None:
    """Whether something was put between a module and its call."""
    for m in model.modules():
        if m._forward_hooks or m._forward_pre_hooks or _has_any_global_hook():
            return "a hook is registered"
        if "forward" in vars(m):
            return "the forward pass of a module is replaced"
        if vars(m).get("_compiled_call_impl"):
            return "a module is compiled"
    return None


def _unfit(model: nn.Module) -> str | None:
    """What there is against the model as it is."""
    modules = list(model.modules())
    experts = [m for m in modules if isinstance(m, MixtureOfExperts)]
    quantizers = [m for m in modules if isinstance(m, CoreQuantizers)]
    own = type(model).forward.__qualname__
    unknown = [type(m).__name__ for m in modules[1:] if type(m) not in _PARTS]
    reasons = {
        "it is in training mode": any(m.training for m in modules),
        "its class has a forward pass of its own": own != "ResNetBKForCausalLM.forward",
        "tokens are counted by expert": any(
            m.load is not None or m.calibration_load is not None for m in experts
        ),
        "its quantizers observe or learn": not all(m.rounds_only for m in quantizers),
        f"it has modules of other kinds: {', '.join(unknown[:3])}": unknown,
    }
    return next((reason for reason, found in reasons.items() if found), None)


class _Bound:
    """An engine for a model's tensors, or why there is none; and whether that still holds."""

    def __init__(self, model: nn.Module) -> None:
        self.config: ResNetBKConfig = model.config  # type: ignore[assignment]
        self.mixers = [m for m in model.modules() if isinstance(m, ResolventMixer)]
        # No reference to the model itself, so that it can go: of its own attributes, some facts.
        self.attributes = vars(model)
        dicts: list[dict[Any, Any]] = [vars(m) for m in model.modules() if m is not model]
        for m in model.modules():
            dicts += [m._modules, m._parameters, m._buffers, m._forward_hooks, m._forward_pre_hooks]
        self.snapshot = native.Snapshot(dicts)
        self.tensors = [*model.parameters(), *model.buffers()]
        self.addresses = list(map(Tensor.data_ptr, self.tensors))
        self.facts = self._facts()
        self.refusal = _unfit(model) or self._open(model)

    def holds(self) -> bool:
        """Whether the model is as it was. Every token asks, so this takes few steps of Python."""
        return (
            self.snapshot.holds()
            and list(map(Tensor.data_ptr, self.tensors)) == self.addresses
            and self._facts() == self.facts
            and (self.refusal is not None or self.engine.is_current())
        )

    def _facts(self) -> tuple[object, ...]:
        """What decides, apart from the snapshot, whether the engine can take the model, and how."""
        return (
            self.attributes["training"],
            "forward" in self.attributes,
            self.attributes.get("_compiled_call_impl"),
            _has_any_global_hook(),
            self.config.embedding_multiplier,
            isa(),
            torch.get_num_threads(),
        )

    def _open(self, model: nn.Module) -> str | None:
        """Set up the engine; or return why it cannot be."""
        tensors = {}
        for name, x in model.state_dict(keep_vars=True).items():
            is_float = x.dtype == torch.float32 or not isinstance(x, nn.Parameter)
            if x.dtype not in _DTYPES or not (_is_plain(x) and x.is_contiguous() and is_float):
                return f"{name} is {x.dtype} on {x.device}"
            tensors[name] = _DTYPES[x.dtype], list(x.shape), x.data_ptr()
        threads = torch.get_num_threads()
        try:
            config = json.dumps(self.config.to_dict(), default=str, allow_nan=False)
            self.engine = native.Engine.of_tensors(tensors, config, threads, isa())
        except (BKCoreError, ValueError) as error:
            return str(error)
        return None

    def step(self, input_ids: Tensor, state: StreamState) -> tuple[Tensor, StreamState]:
        logits = torch.empty(len(input_ids), 1, self.engine.vocabulary)
        before, after = [], []
        for mixer, layer in zip(self.mixers, state.layers, strict=True):
            mixer.check_state(layer)
            fields = layer.taps, layer.g, layer.psi
            if {len(x) for x in fields} != {len(input_ids)}:
                raise ShapeError(
                    f"a layer's state has {[len(x) for x in fields]} sequences in taps, g and psi, "
                    f"but input_ids has {len(input_ids)}"
                )
            before.append([x if x.is_contiguous() else x.contiguous() for x in fields])
            after.append(list(map(torch.empty_like, before[-1])))
        pairs = zip(before, after, strict=True)
        addresses = [tuple(x.data_ptr() for x in (*b, *a)) for b, a in pairs]
        try:
            self.engine.read_at(
                len(input_ids), 1, input_ids.data_ptr(), addresses, logits.data_ptr()
            )
        except InputError as error:
            raise IndexError(str(error)) from error
        layers = tuple(LayerState(*fields) for fields in after)
        return logits, StreamState(layers, state.seen + 1)


_bound: WeakKeyDictionary[nn.Module, _Bound] = WeakKeyDictionary()
