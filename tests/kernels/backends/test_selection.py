"""Which backend runs, and what happens when it cannot."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from bkcore import kernels
from bkcore.errors import BackendError
from bkcore.kernels import describe_backends, sweep, use_backend
from bkcore.kernels.backends import selection
from bkcore.kernels.backends.cpu import native
from bkcore.kernels.backends.interface import Backend
from tests.kernels.operators import DIFFERENTIABLE, OPERATORS, arguments


def chain() -> tuple[Tensor, None, Tensor, Tensor, Tensor]:
    return torch.randn(1, 4, 2), None, torch.zeros(2), torch.ones(1, 2), torch.ones(1, 2)


def said(function: str) -> str:
    """What the log has behind the name of a backend that ran this."""
    return {"sweep": "", "sweep_backward": " backward"}.get(function, f" {function}")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the backends that ran, in order, and of what they did if not a forward sweep."""
    log: list[str] = []

    def spied(backend: Backend, function: str) -> Callable[..., Any]:
        run = getattr(backend, function)

        def spy(*args: Any) -> Any:
            log.append(backend.name + said(function))
            return run(*args)

        return spy

    computing = set(OPERATORS) | {"sweep_step"}
    for name in ("cpu", "reference"):
        backend = selection._BACKENDS[name]
        spies: dict[str, Any] = {function: spied(backend, function) for function in computing}
        monkeypatch.setitem(selection._BACKENDS, name, replace(backend, **spies))
    return log


@pytest.fixture
def no_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_native", None)
    monkeypatch.setattr(native, "_import_error", "No module named '_native'")
    monkeypatch.setattr(selection, "_warned", set())


def test_the_native_kernel_is_built_and_used():
    info = describe_backends()
    assert set(info) == {"cpu", "triton", "reference"}
    assert info["cpu"].available
    assert info["cpu"].isa in native.supported_isas()
    assert info["cpu"].threads == (torch.get_num_threads() if native.has_openmp() else 1)
    assert info["cpu"].used_for == ("cpu",)
    assert info["reference"].used_for == ("other",)
    assert info["triton"].used_for == ("cuda",)


def test_auto_takes_the_native_kernel(calls):
    sweep(*chain())
    with use_backend("reference"), use_backend("auto"):
        sweep(*chain())
    assert calls == ["cpu", "cpu"]


def test_forced_backend_runs_backward_too_and_is_undone(calls):
    given: list[Any] = list(chain())
    v, *rest = given
    with use_backend("reference"):
        assert describe_backends()["reference"].used_for == (*selection._NATIVE, "other")
        assert describe_backends()["cpu"].used_for == ()
        parts = sweep(v.requires_grad_(), *rest)
    parts.sum().backward()
    sweep(v.detach(), *rest)
    assert calls == ["reference", "reference backward", "cpu"]


def both_ways(name: str, backend: str) -> list[str]:
    """The log of a function and its derivative."""
    operator = DIFFERENTIABLE[name]
    return [backend + said(operator), backend + said(f"{operator}_backward")]


def differentiated(name: str, forward: str | None, backward: str | None) -> None:
    """Run a function and its derivative, each with the choice of a backend in force, or none."""
    args = arguments(name)
    for x in args.values():
        if isinstance(x, Tensor) and x.is_floating_point():
            x.requires_grad_()
    with nullcontext() if forward is None else use_backend(forward):
        results = getattr(kernels, name)(**args)
    results = results if isinstance(results, tuple) else (results,)
    total = sum(x.sum() for x in results if x.requires_grad)
    with nullcontext() if backward is None else use_backend(backward):
        total.backward()


@pytest.mark.parametrize("name", DIFFERENTIABLE)
@pytest.mark.parametrize(
    ("forward", "backward", "runs"),
    [
        ("reference", None, "reference"),
        (None, "reference", "cpu"),
        ("reference", "cpu", "reference"),
        ("cpu", "reference", "cpu"),
    ],
)
def test_a_backward_pass_runs_where_its_forward_pass_did(calls, name, forward, backward, runs):
    differentiated(name, forward, backward)
    assert calls == both_ways(name, runs)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_a_backward_pass_in_another_thread_runs_where_its_forward_pass_did(calls, name):
    args = arguments(name)
    leaf = next(x for x in args.values() if isinstance(x, Tensor)).requires_grad_()
    with use_backend("reference"):
        results = getattr(kernels, name)(**args)
        total = (results if isinstance(results, tuple) else (results,))[-1].sum()
    other = threading.Thread(target=total.backward)
    other.start()
    other.join()
    assert leaf.grad is not None
    assert calls == both_ways(name, "reference")


def test_choice_belongs_to_its_thread(calls):
    with use_backend("reference"):
        other = threading.Thread(target=lambda: sweep(*chain()))
        other.start()
        other.join()
    assert calls == ["cpu"]


def test_environment_variable(calls, monkeypatch):
    monkeypatch.setattr(selection, "_environment", "reference")
    sweep(*chain())
    with use_backend("cpu"):
        sweep(*chain())
    assert calls == ["reference", "cpu"]


def test_environment_variable_is_read_and_checked():
    code = (
        "from bkcore.kernels import describe_backends\n"
        "from bkcore.errors import BackendError\n"
        "try:\n    describe_backends()\nexcept BackendError as error:\n    print(error)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "BKCORE_BACKEND": "abacus"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.strip() == (
        "there is no backend 'abacus'; choose one of: auto, cpu, triton, reference"
    )


def test_unknown_name_raises():
    with pytest.raises(BackendError, match="choose one of: auto, cpu, triton, reference"):
        use_backend("triton2").__enter__()


def test_forced_absent_backend_raises_with_reason_and_remedy(no_extension):
    with pytest.raises(BackendError, match=r"No module named '_native'.*reinstall"):
        use_backend("cpu").__enter__()


def test_absent_backend_from_the_environment_raises(no_extension, monkeypatch):
    monkeypatch.setattr(selection, "_environment", "cpu")
    with pytest.raises(BackendError, match=r"'cpu' was requested, but .*did not load"):
        sweep(*chain())


def test_missing_extension_warns_once_and_says_so(no_extension, recwarn):
    with pytest.warns(UserWarning, match="slow PyTorch reference.*reinstall"):
        parts = sweep(*chain())
    recwarn.clear()
    sweep(*chain())
    assert not recwarn.list
    assert parts.isfinite().all()
    info = describe_backends()
    assert not info["cpu"].available
    assert "did not load" in info["cpu"].reason
    assert info["cpu"].threads is None
    assert info["reference"].used_for == ("cpu", "other")


def test_forced_backend_refuses_another_device():
    with use_backend("cpu"), pytest.raises(BackendError, match="takes CPU tensors, not meta"):
        selection.select(torch.empty(1, device="meta"))


def test_auto_on_another_device_is_the_reference():
    assert selection.select(torch.empty(1, device="meta")).name == "reference"
