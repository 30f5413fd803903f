"""The rows for a GPU, on small shapes in Triton's interpreter, and what is said without a GPU."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from bkcore import cli
from bkcore.bench import gpu
from bkcore.errors import BenchmarkError
from bkcore.kernels import selection, triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def once(call: Callable[[], object]) -> float:
    call()
    return 1.0


def test_rows(monkeypatch):
    monkeypatch.setattr(gpu, "SHAPES", ((1, 10, 3),))
    results = gpu.run_gpu(Console(quiet=True), DEVICE, once)
    kinds = ["{}", "backward/{}", "codes/{}/int8", "codes/{}/int4"]
    forms = ["g", "g+psi", "two-sided"]
    assert [r.name for r in results] == [f"gpu/{kind.format(f)}" for f in forms for kind in kinds]
    assert {r.target for r in results} == {0.5, 1 / 3, 1.8, None}


def test_a_wrong_kernel_gets_no_speed(monkeypatch):
    monkeypatch.setattr(gpu, "SHAPES", ((1, 10, 3),))
    wrong = replace(triton.BACKEND, sweep=lambda *args: 1.001 * triton.sweep(*args))
    monkeypatch.setitem(selection._BACKENDS, "triton", wrong)
    with pytest.raises(BenchmarkError, match="wrong result"):
        gpu.run_gpu(Console(quiet=True), DEVICE, once)


def test_no_gpu_is_a_clear_sentence(monkeypatch, capsys):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(cli, "keep_freed_memory", lambda: None)
    monkeypatch.setattr(sys, "argv", ["bkcore", "bench", "gpu"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2
    assert "measures the Triton kernels, but PyTorch sees no GPU" in capsys.readouterr().err
