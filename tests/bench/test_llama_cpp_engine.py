"""llama.cpp on small files: it gives what transformers gives. Without it, a sentence says so."""

from __future__ import annotations

import importlib.util
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from bkcore.bench import llama_cpp_engine
from bkcore.bench.llama_cpp_engine import (
    FORMATS,
    LlamaCpp,
    build_llama,
    check_close,
    check_engine,
    check_llama_cpp,
    describe,
    require_llama_cpp,
    write_gguf,
)
from bkcore.errors import BenchmarkError, InputError
from bkcore.processes import ProcessDiedError

TINY: dict[str, Any] = {"width": 128, "layers": 2, "heads": 2, "cached_heads": 1, "hidden": 64}
installed = all(importlib.util.find_spec(name) for name in ("llama_cpp", "gguf"))
needs_llama_cpp = pytest.mark.skipif(
    not installed, reason="llama.cpp is not installed (pip install 'bkcore[bench]')"
)


def test_how_to_install_it_is_said_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'bkcore\[bench\]', or .* --no-rivals"):
        require_llama_cpp()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    require_llama_cpp()


@pytest.mark.parametrize("found", [[1.0, -2.0, 0.5], [1.0, -2.0, float("nan")]])
def test_numbers_that_differ_are_refused(found: list[float]) -> None:
    expected = np.array([1.0, -2.0, 0.0], np.float32)
    check_close(expected, expected, 0.0, "they differ")
    with pytest.raises(BenchmarkError, match="they differ by"):
        check_close(np.array(found, np.float32), expected, 0.2, "they differ")


def test_a_library_that_ends_its_process_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def die(function: object) -> None:
        raise ProcessDiedError(-11)

    monkeypatch.setattr(llama_cpp_engine, "call_in_new_process", die)
    monkeypatch.setattr(llama_cpp_engine, "describe", lambda: {"system": "AVX2 = 1"})
    with pytest.raises(BenchmarkError, match=r"exit code -11 on a small .*CC=clang"):
        check_llama_cpp()
    monkeypatch.setattr(llama_cpp_engine, "describe", lambda: {"system": "AMX_INT8 = 1 |"})
    with pytest.raises(InputError, match="again with CFLAGS=-mno-amx-int8 CXXFLAGS=-mno"):
        check_llama_cpp()


def test_an_interrupted_look_at_the_loop_leaves_llama_cpp_in_its_place(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupted(self: LlamaCpp, first: int, steps: int) -> None:
        assert self._decode(None, None) == 0
        raise KeyboardInterrupt

    engine = LlamaCpp.__new__(LlamaCpp)
    engine.position = 7
    engine._library = SimpleNamespace(llama_decode=object())
    forgotten: list[int] = []
    monkeypatch.setattr(LlamaCpp, "read", lambda self, tokens: None)
    monkeypatch.setattr(LlamaCpp, "greedy", interrupted)
    monkeypatch.setattr(LlamaCpp, "forget", lambda self, position: forgotten.append(position))
    with pytest.raises(KeyboardInterrupt):
        engine.loop_seconds()
    assert engine._decode is engine._library.llama_decode
    assert forgotten == [7]


@needs_llama_cpp
def test_every_format_is_the_model_that_it_was_made_of() -> None:
    check_llama_cpp()
    assert "CPU" in describe()["system"]


@needs_llama_cpp
@pytest.mark.parametrize("form", FORMATS)
def test_another_model_is_found_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    monkeypatch.setattr(llama_cpp_engine, "_in_pairs", lambda config, name, tensor: tensor)
    model = build_llama(64, **TINY)
    write_gguf(model, tmp_path / "file", form)
    with (
        closing(LlamaCpp(tmp_path / "file", 64, False)) as engine,
        pytest.raises(BenchmarkError, match=f"{form} differ from those of transformers"),
    ):
        check_engine(engine, model, form)


@needs_llama_cpp
@pytest.mark.parametrize("flash", [False, True])
def test_a_text_is_read_on_and_cut(tmp_path: Path, flash: bool) -> None:
    model = build_llama(70, **TINY)
    write_gguf(model, tmp_path / "file", "F32")
    tokens = torch.randint(70, (1, 700))  # more than a piece
    with torch.inference_mode():
        expected = model(tokens).logits[0].numpy()
    with closing(LlamaCpp(tmp_path / "file", 1024, flash)) as engine:
        engine.use_threads(2)
        engine.read(tokens[0, :20].numpy())
        found = engine.read(tokens[0, 20:].numpy())
        check_close(found, expected[-1], 5e-3, "logits differ")
        assert engine.position == 700
        assert engine.loop_seconds(10) > 0
        engine.forget(30)
        assert engine.position == 30
        check_close(engine.read(tokens[0, 30:32].numpy()), expected[31], 5e-3, "logits differ")
        engine.forget(0)
        check_engine(engine, model, "F32")


@needs_llama_cpp
def test_it_writes_the_likeliest_tokens(tmp_path: Path) -> None:
    model = build_llama(70, **TINY)
    write_gguf(model, tmp_path / "file", "F32")
    with torch.inference_mode():
        expected = [3]
        for _ in range(8):
            expected.append(int(model(torch.tensor([expected])).logits[0, -1].argmax()))
    with closing(LlamaCpp(tmp_path / "file", 64, False)) as engine:
        assert engine.greedy(3, 8) == expected[1:]
        assert engine.position == 8


@needs_llama_cpp
def test_bytes_are_those_of_the_format(tmp_path: Path) -> None:
    model = build_llama(64, **TINY)
    norms = sum(p.numel() for p in model.parameters() if p.dim() == 1)
    matrices = sum(p.numel() for p in model.parameters() if p.dim() == 2)
    for form, bits in (("F32", 32), ("Q8_0", 8.5), ("Q4_0", 4.5)):
        size = write_gguf(model, tmp_path / form, form)
        assert size == 4 * norms + matrices * bits / 8
        assert 0 < (tmp_path / form).stat().st_size - size < 10_000


@needs_llama_cpp
def test_what_llama_cpp_refuses_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("nothing")
    with pytest.raises(BenchmarkError, match=r"llama.cpp does not load .*file: .*"):
        LlamaCpp(tmp_path / "file", 64, False)
