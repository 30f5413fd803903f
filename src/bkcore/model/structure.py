"""Check that a model consists of the parts that its configuration names.

Quantization replaces layers. Anything attached to a layer, such as an adapter, a parametrization or
a hook, would silently disappear with it. What a subclass adds beside these parts stays as it is.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from bkcore.errors import LifecycleError
from bkcore.model.conversion import quantizable
from bkcore.quantization.gptq import InputMoments

_REMEDY = (
    "merge adapters first (merge_and_unload()), remove parametrizations, norms and pruning of "
    "weights (remove_parametrizations(), prune.remove()) and hooks (remove()), and shard, wrap or "
    "compile afterwards"
)


def check_structure(model: nn.Module, expected: nn.Module, step: str) -> None:
    """Refuse to quantize a model that is not as its configuration builds it.

    Args:
        model: the model.
        expected: a `ResNetBKForCausalLM` of the same configuration, on any device; `model` may be
            of a subclass with modules and tensors of its own.
        step: the method that is about to replace layers.

    Raises:
        LifecycleError: naming the first part that differs.
    """
    for problem in _problems(model, expected):
        raise LifecycleError(
            f"{step}() takes a model as its configuration builds it, but {problem}, which might be "
            f"lost: {_REMEDY}"
        )


def _problems(model: nn.Module, expected: nn.Module) -> Iterator[str]:
    modules, wanted = (dict(m.named_modules(remove_duplicate=False)) for m in (model, expected))
    parts = dict(expected.named_children())
    slots = list(quantizable(model))
    # What was added beside the model's parts stays, unless layers in it would be replaced.
    replaced = {slot.name.partition(".")[0] for slot in slots}
    for name, module in modules.items():
        part = name.partition(".")[0]
        if module._compiled_call_impl is not None:
            yield f"{name or 'the model itself'} is compiled"
        if part not in parts and part not in replaced:  # the model itself, too
            continue
        if name not in wanted:
            yield f"{name} was added to it, a {_kind(module)}"
        elif type(module) is not type(wanted[name]):
            yield f"{name} is a {_kind(module)}, not a {_kind(wanted[name])}"
        else:
            yield from _tensor_problems(name, module, wanted[name])
    yield from (f"{name} is not there" for name in wanted.keys() - modules.keys())
    # Activation checkpointing leaves a transformers hook that gives embedded tokens a gradient. It
    # may go: trainable codes give them one anyway, and packed ones need none.
    known = {handle.id for handle in getattr(model, "_require_grads_hooks", ())}
    for slot in slots:
        yield from _layer_problems(slot.name, slot.layer, known)
    yield from _shared(model)


def _tensor_problems(place: str, module: nn.Module, wanted: nn.Module) -> Iterator[str]:
    for kind, attribute in ((nn.Parameter, "_parameters"), (Tensor, "_buffers")):
        found: dict[str, Tensor | None] = getattr(module, attribute)
        known: dict[str, Tensor | None] = getattr(wanted, attribute)
        for name in sorted(found.keys() ^ known.keys()):
            yield f"{name} of {place} was {'added' if name in found else 'taken away'}"
        for name in found.keys() & known.keys():
            tensor, like = found[name], known[name]
            if tensor is None and like is None:
                continue
            if tensor is None or like is None:
                yield f"{name} of {place} was {'taken away' if tensor is None else 'added'}"
            elif type(tensor) is not kind:
                yield f"{name} of {place} is a {type(tensor).__qualname__}"
            elif tensor.shape != like.shape:
                yield f"{name} of {place} is {tuple(tensor.shape)}, not {tuple(like.shape)}"
            elif tensor.is_meta:
                yield f"{name} of {place} is on the meta device, without values"


def _layer_problems(name: str, layer: nn.Module, known: set[int]) -> Iterator[str]:
    """What a layer to be replaced has besides its weight and the known hooks."""
    moments = getattr(layer, "moments", None)
    own = moments.hook_id if isinstance(moments, InputMoments) else None
    hooks = {*layer._forward_hooks, *layer._backward_hooks, *layer._backward_pre_hooks}
    if (hooks | layer._forward_pre_hooks.keys()) - {own, *known}:
        yield f"{name} has hooks"
    if "forward" in vars(layer):
        yield f"{name} has a forward() of its own"


def _shared(model: nn.Module) -> Iterator[str]:
    names: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in names:
            yield f"{name} is shared with {names[id(parameter)]}"
        names[id(parameter)] = name


def _kind(module: nn.Module) -> str:
    kind = type(module)
    known = kind.__module__.startswith(("torch.nn.modules.", "bkcore."))
    return kind.__qualname__ if known else f"{kind.__module__}.{kind.__qualname__}"
