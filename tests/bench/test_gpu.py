"""The rows for a GPU, on small shapes in Triton's interpreter, and what is said without a GPU."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from transformers import GPT2LMHeadModel

from bkcore import cli
from bkcore.bench import gpu, rival_models
from bkcore.errors import BenchmarkError
from bkcore.kernels.backends import selection, triton
from bkcore.model import LanguageModel

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def once(call: Callable[[], object]) -> float:
    call()
    return 1.0


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "SHAPES", ((1, 10, 3),))
    scale = gpu.Scale(width=32, layers=1, vocabulary=40, window=6, batch=1, sequences=3)
    monkeypatch.setattr(gpu, "SCALE", scale)


def test_rows():
    results = gpu.run_gpu(Console(quiet=True), DEVICE, once)
    kinds = ["{}", "backward/{}", "codes/{}/int8", "codes/{}/int4"]
    forms = ["g", "g+psi", "two-sided"]
    sweeps = [f"gpu/{kind.format(form)}" for form in forms for kind in kinds]
    models = ["training step, bfloat16 autocast", "decoding INT8", "decoding INT4"]
    assert [r.name for r in results] == [*sweeps, *(f"gpu/{name}" for name in models)]
    assert {r.target for r in results} == {0.5, 1 / 3, 1.8, 1.0, None}
    assert results[-1].shape == (3, 1)
    assert results[-1].baseline == "GPT-2 bfloat16 after 6"


def test_the_models_that_are_timed_are_of_one_size():
    """At full scale: about 100 million parameters each, to a layer of GPT-2."""
    scale = gpu.Scale()
    with torch.device("meta"):
        model = LanguageModel(
            scale.vocabulary, scale.width, scale.layers, 4096, expert_size=2 * scale.width
        )
    count = rival_models.count_parameters(model)
    assert 0.9e8 < count < 1.2e8
    assert abs(rival_models.count_parameters(gpu._gpt2(scale, count)) / count - 1) < 0.04


def test_a_model_that_computes_nonsense_gets_no_speed(monkeypatch):
    monkeypatch.setattr(gpu, "SHAPES", ())
    init = GPT2LMHeadModel.__init__

    def broken(self, *args, **options):
        init(self, *args, **options)
        torch.nn.init.constant_(self.lm_head.weight, torch.nan)

    monkeypatch.setattr(GPT2LMHeadModel, "__init__", broken)
    with pytest.raises(BenchmarkError, match="the loss of GPT2LMHeadModel is nan"):
        gpu.run_gpu(Console(quiet=True), DEVICE, once)


def test_a_wrong_kernel_gets_no_speed(monkeypatch):
    wrong = replace(triton.BACKEND, sweep=lambda args: 1.001 * triton.BACKEND.sweep(args))
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
