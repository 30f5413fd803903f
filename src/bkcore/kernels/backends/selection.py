"""Which backend runs: chosen by device, or forced by `use_backend` or BKCORE_BACKEND."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bkcore.arguments import did_you_mean
from bkcore.errors import BackendError
from bkcore.kernels.backends import cpu, reference, triton
from bkcore.kernels.backends.interface import Backend

AUTO = "auto"
_BACKENDS: dict[str, Backend] = {
    b.name: b for b in (cpu.BACKEND, triton.BACKEND, reference.BACKEND)
}
_environment = os.environ.get("BKCORE_BACKEND") or AUTO
_choice: ContextVar[str | None] = ContextVar("bkcore_backend", default=None)
_warned: set[str] = set()
_NATIVE = {"cpu": "cpu", "cuda": "triton"}
"""The preferred backend for each device; the reference takes the tensors of all others."""

_DEVICES = {backend: (device,) for device, backend in _NATIVE.items()}


@dataclass(frozen=True)
class BackendInfo:
    """The status of one backend on this machine.

    Attributes:
        available: whether it can be used at all.
        reason: why not, with a remedy; empty if available.
        isa: the instruction set of the native kernel; None where it means nothing.
        threads: how many threads it will use; None where PyTorch decides.
        used_for: the devices whose tensors it gets under the present choice: "cpu", "cuda",
            "other" for those that no backend but the reference is for.
    """

    available: bool
    reason: str
    isa: str | None
    threads: int | None
    used_for: tuple[str, ...]


def describe_backends() -> dict[str, BackendInfo]:
    """Every backend by name: whether it is available, and which tensors it currently gets."""
    choice = current_choice()
    return {name: _info(backend, choice) for name, backend in _BACKENDS.items()}


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Force a backend ("cpu", "triton", "reference") or "auto" inside a with block.

    It overrides the environment variable BKCORE_BACKEND, which is read at import. A backward pass
    uses the choice in force during its forward pass, except under `torch.compile`, where it uses
    the choice in force when it runs.

    Raises:
        BackendError: if the name is unknown, or the backend is not available.
    """
    if _known(name) != AUTO:
        _require_present(_BACKENDS[name])
    token = _choice.set(name)
    try:
        yield
    finally:
        _choice.reset(token)


def current_choice() -> str:
    """The choice in force: `use_backend` first, then BKCORE_BACKEND, then "auto"."""
    return _choice.get() or _known(_environment)


def keep_choice(ctx: Any) -> None:
    """In the forward pass of an autograd function: remember the choice in force."""
    # Dynamo cannot trace context variables; its graphs choose when they run.
    ctx.choice = None if torch.compiler.is_compiling() else current_choice()


def kept_choice(ctx: Any) -> contextlib.AbstractContextManager[None]:
    """In its backward pass: restore the choice that `keep_choice` remembered, in a with block.

    Autograd may run a backward pass after the forward pass's with block has ended, or in a thread
    of its own, which does not see the context variable.
    """
    return contextlib.nullcontext() if ctx.choice is None else use_backend(ctx.choice)


def select(v: Tensor) -> Backend:
    """The backend that will take tensors like v.

    Raises:
        BackendError: if a forced backend is not available or cannot take this device or dtype.
    """
    choice = current_choice()
    if choice == AUTO:
        return _automatic(v.device.type)
    backend = _BACKENDS[choice]
    _require_present(backend)
    refusal = backend.refuses(v)
    if refusal is not None:
        raise BackendError(f"backend {choice!r} cannot take these tensors: {refusal}")
    return backend


def _automatic(device: str) -> Backend:
    native = _NATIVE.get(device)
    if native is None:
        return _BACKENDS["reference"]
    reason = _BACKENDS[native].absent()
    if reason is None:
        return _BACKENDS[native]
    _warn_once(device, reason)
    return _BACKENDS["reference"]


def _warn_once(device: str, reason: str) -> None:
    if device not in _warned:
        _warned.add(device)
        warnings.warn(
            f"bkcore runs its slow PyTorch reference on {device.upper()} tensors, because {reason}",
            UserWarning,
            stacklevel=2,
        )


def _require_present(backend: Backend) -> None:
    reason = backend.absent()
    if reason is not None:
        raise BackendError(f"backend {backend.name!r} was requested, but {reason}")


def _known(name: str) -> str:
    if name != AUTO and name not in _BACKENDS:
        known = [AUTO, *_BACKENDS]
        raise BackendError(
            f"there is no backend {name!r}; choose one of: {', '.join(known)}"
            f"{did_you_mean(name, known)}"
        )
    return name


def _info(backend: Backend, choice: str) -> BackendInfo:
    reason = backend.absent()
    isa, threads = backend.describe()
    return BackendInfo(
        available=reason is None,
        reason=reason or "",
        isa=isa,
        threads=threads,
        used_for=_used_for(backend.name, choice, reason is None),
    )


def _used_for(name: str, choice: str, available: bool) -> tuple[str, ...]:
    if choice != AUTO:
        devices = _DEVICES.get(name, (*_NATIVE, "other"))
        return devices if name == choice and available else ()
    if name != "reference":
        return _DEVICES[name] if available else ()
    missing = [d for d, native in _NATIVE.items() if _BACKENDS[native].absent() is not None]
    return (*missing, "other")
