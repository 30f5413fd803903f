"""Which backend runs, and what happens when it cannot."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from bkcore.errors import BackendError
from bkcore.kernels import backends, cpu, selection, sweep, use_backend


def chain() -> tuple[Tensor, None, Tensor, Tensor, Tensor]:
    return torch.randn(1, 4, 2), None, torch.zeros(2), torch.ones(1, 2), torch.ones(1, 2)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the backends that ran, in order."""
    log: list[str] = []

    def recorded(name: str) -> None:
        backend = selection._BACKENDS[name]

        def forward(*args):
            log.append(name)
            return backend.sweep(*args)

        def backward(*args):
            log.append(f"{name} backward")
            return backend.sweep_backward(*args)

        spy = replace(backend, sweep=forward, sweep_backward=backward)
        monkeypatch.setitem(selection._BACKENDS, name, spy)

    recorded("cpu")
    recorded("reference")
    return log


@pytest.fixture
def no_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_native", None)
    monkeypatch.setattr(cpu, "_import_error", "No module named '_native'")
    monkeypatch.setattr(selection, "_warned", set())


def test_the_native_kernel_is_built_and_used():
    info = backends()
    assert set(info) == {"cpu", "triton", "reference"}
    assert info["cpu"].available
    assert info["cpu"].isa in cpu.supported_isas()
    assert info["cpu"].threads == (torch.get_num_threads() if cpu.has_openmp() else 1)
    assert info["cpu"].used_for == ("cpu",)
    assert info["reference"].used_for == ("other",)
    assert info["triton"].used_for == ("cuda",)


def test_auto_takes_the_native_kernel(calls):
    sweep(*chain())
    with use_backend("reference"), use_backend("auto"):
        sweep(*chain())
    assert calls == ["cpu", "cpu"]


def test_forced_backend_runs_backward_too_and_is_undone(calls):
    v, *rest = chain()
    with use_backend("reference"):
        assert backends()["reference"].used_for == ("cpu", "cuda", "other")
        assert backends()["cpu"].used_for == ()
        parts = sweep(v.requires_grad_(), *rest)
    parts.sum().backward()
    sweep(v.detach(), *rest)
    assert calls == ["reference", "reference backward", "cpu"]


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
        "from bkcore.kernels import backends\n"
        "from bkcore.errors import BackendError\n"
        "try:\n    backends()\nexcept BackendError as error:\n    print(error)"
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
    with pytest.raises(BackendError, match=r"'cpu' was asked for, but .*did not load"):
        sweep(*chain())


def test_missing_extension_warns_once_and_says_so(no_extension, recwarn):
    with pytest.warns(UserWarning, match="slow PyTorch reference.*reinstall"):
        parts = sweep(*chain())
    recwarn.clear()
    sweep(*chain())
    assert not recwarn.list
    assert parts.isfinite().all()
    info = backends()
    assert not info["cpu"].available
    assert "did not load" in info["cpu"].reason
    assert info["cpu"].threads is None
    assert info["reference"].used_for == ("cpu", "other")


def test_forced_backend_refuses_another_device():
    with use_backend("cpu"), pytest.raises(BackendError, match="takes CPU tensors, not meta"):
        selection.select(torch.empty(1, device="meta"))


def test_auto_on_another_device_is_the_reference():
    assert selection.select(torch.empty(1, device="meta")).name == "reference"
