"""Whether the modules of a model compute what its configuration and its tensors say.

In Python everything can be replaced: a module, a method of a class or of a single object, a size.
The engine goes by the configuration and the tensors alone, so it must not run where the modules
would not.
"""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import nn

from bkcore.model.config import ResNetBKConfig
from bkcore.model.core_quantizers import CoreQuantizers
from bkcore.model.functions import RMSNorm, Router, ShortConvolution
from bkcore.model.layers import ResNetBKLayer, TokenEmbedding
from bkcore.model.mixer import Features, ResolventMixer
from bkcore.model.moe import Expert, MixtureOfExperts
from bkcore.quantization.complex_quantizer import ComplexQuantizer
from bkcore.quantization.levels import LevelTable
from bkcore.quantization.linear import QuantizedEmbedding, QuantizedLinear
from bkcore.quantization.quantizers import GroupWiseQuantizer
from bkcore.quantization.weights import HalfWeight, PackedWeight

_PARTS = (
    *(nn.ModuleList, nn.Dropout, nn.Linear, TokenEmbedding, ResNetBKLayer, RMSNorm, Router),
    *(ShortConvolution, ResolventMixer, Features, MixtureOfExperts, Expert),
    *(QuantizedEmbedding, QuantizedLinear, PackedWeight, HalfWeight, CoreQuantizers),
    *(ComplexQuantizer, GroupWiseQuantizer, LevelTable),
)
"""Classes of modules that the engine knows; any other may compute something else."""

_CALLS = (
    *("__call__", "_wrapped_call_impl", "_call_impl", "forward", "_conv_forward"),
    *("__getattribute__", "__getattr__", "__getitem__", "__iter__", "__len__", "get_submodule"),
)
"""Methods of PyTorch and transformers that run when a module is called."""

_STEPS = (
    *("_step", "_objection", "_has_graph", "_computing", "_hidden", "_embedded", "_losses"),
    *("first_state", "config", "training"),
)
"""Names that, beside `_CALLS`, decide what a call of a model gives."""

_IDLE = {"training", "p", "tokens_seen", "_calibrated", "_known", "_is_hf_initialized"}
"""Attributes of modules that change no number outside training, or are looked at elsewhere."""

_ABSENT = object()

M = TypeVar("M", bound=type[nn.Module])


def _functions(kind: type) -> dict[str, object]:
    """What a class computes with: all its methods and properties if it is of this package."""
    ours = kind.__module__.partition(".")[0] == "bkcore"
    return {
        name: x
        for name, x in vars(kind).items()
        if (ours and (callable(x) or hasattr(x, "__get__"))) or name in _CALLS
    }


_KINDS = {kind for part in _PARTS for kind in part.__mro__} - {object}
_FUNCTIONS = {kind: _functions(kind) for kind in _KINDS}  # before anybody may replace one

_model: dict[str, Any] = {}
"""The class of models, and what it computes with."""


def known_model(kind: M) -> M:
    """Decorate the class of models, so that the engine knows it; before anybody may change it."""
    names = (*_CALLS, *_STEPS)
    methods = {name: inspect.getattr_static(kind, name, _ABSENT) for name in names}
    _model.update(kind=kind, methods=methods)
    return kind


def classes(model: nn.Module) -> set[type]:
    """The classes whose methods run when a model is called."""
    return _KINDS | set(type(model).__mro__) - {object}


def meddled(model: nn.Module) -> str | None:
    """What was put between a module and its computation, or runs instead of it; None if nothing."""
    return next(_meddled(model), None)


def _meddled(model: nn.Module) -> Iterator[str]:
    modules = list(model.modules())
    for module in modules:
        if module._forward_hooks or module._forward_pre_hooks:
            yield "a hook is registered"
        if module._compiled_call_impl is not None:
            yield "a module is compiled"
        for name in _hidden_by(module, all_methods=module is not model):
            yield f"the {_called(name)} of a module is replaced"
    for kind, functions in _FUNCTIONS.items():
        found = _functions(kind)
        for name in found.keys() | functions.keys():
            if found.get(name) is not functions.get(name):
                yield f"{kind.__qualname__}.{name} is replaced"
    if not isinstance(model, _model["kind"]):
        yield f"it is a {type(model).__qualname__}, not a {_model['kind'].__qualname__}"
    for name, method in _model["methods"].items():
        if inspect.getattr_static(type(model), name, _ABSENT) is not method:
            yield f"its class has a {_called(name)} of its own"
    unknown = [type(module).__name__ for module in modules[1:] if type(module) not in _PARTS]
    if unknown:
        yield f"it has modules of other kinds: {', '.join(unknown[:3])}"
    for module in modules:
        if isinstance(module, nn.ModuleList):
            names = list(module._modules)
            if names != list(map(str, range(len(names)))):
                yield f"a list of modules has another order than its names: {', '.join(names)}"


def _called(name: str) -> str:
    return "forward pass" if name == "forward" else name


def _hidden_by(module: nn.Module, *, all_methods: bool) -> Iterator[str]:
    """Names of methods, submodules and tensors that something else hides at this one object."""
    inner = {*module._modules, *module._parameters, *module._buffers}
    yield from (name for name in inner if hasattr(type(module), name))
    for name, x in vars(module).items():
        ours = all_methods or name in (*_CALLS, *_STEPS)
        if name in inner or (ours and callable(x) and hasattr(type(module), name)):
            yield name


def misfit(model: nn.Module, config: str) -> str | None:
    """How the modules differ from those of a configuration, given as JSON; None if they do not.

    Raises:
        InputError: if there is no such configuration.
    """
    for path, (kind, attributes) in _as_built(config).items():
        try:
            module = model.get_submodule(path)
        except AttributeError:
            return f"{path} is not there"
        if type(module) is not kind:
            return f"{path} is a {type(module).__qualname__}, not a {kind.__qualname__}"
        for name, expected in attributes.items():
            found = vars(module).get(name, _ABSENT)
            if found is _ABSENT or found != expected:
                shown = "missing" if found is _ABSENT else repr(found)
                return f"{name} of {path} is {shown}, but the configuration says {expected!r}"
    return None


@functools.lru_cache(maxsize=4)
def _as_built(config: str) -> dict[str, tuple[type, dict[str, object]]]:
    """Class and plain attributes of every module below a model of a configuration, by path."""
    with torch.device("meta"):
        built: nn.Module = _model["kind"](ResNetBKConfig.from_dict(json.loads(config)))
    return {
        path: (
            type(module),
            {k: x for k, x in vars(module).items() if k not in _IDLE and _is_plain(x)},
        )
        for path, module in built.named_modules()
        if path
    }


def _is_plain(x: object) -> bool:
    if isinstance(x, tuple | list):
        return all(map(_is_plain, x))
    return x is None or isinstance(x, int | float | str)
