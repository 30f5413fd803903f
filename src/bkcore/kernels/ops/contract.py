"""Turns a contract into a PyTorch operator, in the same way for every operator."""

from __future__ import annotations

import typing
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor

from bkcore.errors import BackendError
from bkcore.kernels.backends.interface import Backend
from bkcore.kernels.backends.selection import keep_choice, kept_choice, select

A = TypeVar("A", bound=tuple[Any, ...])

_library = torch.library.Library("bkcore", "FRAGMENT")
_TYPES = {Tensor: "Tensor", Tensor | None: "Tensor?", int: "int", bool: "bool", float: "float"}


def define(
    name: str,
    arguments: type[A],
    check: Callable[[A], A],
    run: Callable[[Backend, A], Any],
    like: Callable[[A], Any],
    results: int = 1,
) -> None:
    """Define the operator `torch.ops.bkcore.<name>`.

    Args:
        name: of the operator.
        arguments: the bundle of `bkcore.kernels.backends.interface` that names the arguments, the
            first of which is a tensor.
        check: raises unless they fit together, and returns them with sizes brought into range.
        run: lays checked arguments out in memory and calls a backend.
        like: returns empty tensors with the shapes, dtypes and strides of the result of `run`.
        results: how many tensors there are; one is returned alone, more as a tuple.
    """
    hints = typing.get_type_hints(arguments)
    taken = ", ".join(f"{_TYPES[hint]} {argument}" for argument, hint in hints.items())
    given = "Tensor" if results == 1 else f"({', '.join(['Tensor'] * results)})"
    _library.define(f"{name}({taken}) -> {given}")

    def compute(*args: Any) -> Any:
        checked = check(arguments(*args))
        found = run(select(args[0]), checked)
        return found if results == 1 else tuple(found)

    def fake(*args: Any) -> Any:
        made = like(check(arguments(*args)))
        return made if results == 1 else tuple(made)

    _library.impl(name, compute, "CompositeExplicitAutograd")
    torch.library.register_fake(f"bkcore::{name}", fake, lib=_library)


def define_derivative(
    name: str,
    setup_context: Callable[[Any, tuple[Any, ...], Any], None],
    backward: Callable[..., tuple[Tensor | None, ...]],
) -> None:
    """Make an operator differentiable once, through the operator `<name>_backward`.

    Args:
        name: of the operator.
        setup_context, backward: as for `torch.library.register_autograd`. The backward pass runs on
            the backend that its forward pass used.
    """

    def keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        setup_context(ctx, inputs, output)
        keep_choice(ctx)

    def differentiate(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        with kept_choice(ctx):
            return backward(ctx, *grads)

    torch.library.register_autograd(
        f"bkcore::{name}", differentiate, setup_context=keep, lib=_library
    )
    torch.library.register_autograd(f"bkcore::{name}_backward", _no_second_derivative, lib=_library)


def define_vmap(name: str, vmap: Callable[..., Any]) -> None:
    """Support `torch.func.vmap` of an operator; arguments as for `torch.library.register_vmap`."""
    torch.library.register_vmap(f"bkcore::{name}", vmap, lib=_library)


def _no_second_derivative(ctx: Any, *grads: Tensor) -> NoReturn:
    raise BackendError(
        "bkcore's operators can be differentiated only once, but a second derivative was requested "
        "(by create_graph=True, a gradient penalty or a Hessian), which is not implemented"
    )
