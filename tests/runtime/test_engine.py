"""The engine computes what the model does, the same bits however the work is cut."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bkcore.model.engine import use_engine
from bkcore_runtime import (
    CheckpointError,
    Engine,
    _engine,
    engine,
)
from tests.runtime.conftest import READ, Save, Saved, cut, draw, same

QUANTIZED = [form for form in READ if form[1] == "quantized"]

# ---- what it computes -----------------------------------------------------------------------


@torch.no_grad()
def test_logits_are_those_of_the_model(saved: Saved) -> None:
    """Of a float model up to rounding: PyTorch's products sum in another order."""
    engine = Engine(saved.folder)
    ids = draw(3, 50)
    found = [cut(engine, ids[:, :length], [])[0] for length in range(1, 51)]
    wanted = saved.model(torch.from_numpy(ids)).logits.transpose(0, 1)
    assert np.array_equal(np.argmax(found, -1), wanted.argmax(-1).numpy())
    if saved.model.quantization_state != "quantized":
        close = np.isclose(found, wanted.numpy(), rtol=1e-4, atol=1e-4)
        assert close.mean() > 0.99999


@pytest.mark.parametrize("form", QUANTIZED, ids=lambda form: form[0])
@torch.no_grad()
def test_a_quantized_model_has_the_bits_of_its_modules(save: Save, form: tuple[str, str]) -> None:
    model, folder = save(*form)
    engine, ids = Engine(folder), draw(3, 50)
    state = engine.start(3)
    theirs: Any = None
    with use_engine("never"):
        for site in range(50):
            token = ids[:, site : site + 1]
            wanted = model(torch.from_numpy(token), cache_params=theirs, use_cache=True)
            theirs = wanted.cache_params
            found = torch.from_numpy(engine.read(state, token))
            assert torch.equal(found, wanted.logits[:, 0]), site
    for own, layer in zip(state.layers, theirs.layers, strict=True):
        for name in own._fields:
            assert np.array_equal(getattr(own, name), getattr(layer, name).numpy()), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_short_floats_are_widened(save: Save, dtype: torch.dtype, tmp_path: Path) -> None:
    model: Any = save().model
    model.to(dtype)
    model.save_pretrained(tmp_path / "short")
    ids = draw(2, 30)
    wanted = model.float()(torch.from_numpy(ids)).logits[:, -1].numpy()
    found, _ = cut(Engine(tmp_path / "short"), ids, [])
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"num_experts": 1, "experts_per_token": 1},
        {"num_heads": 4, "key_groups": 2, "value_size": 5},
        {"conv_width": 1},
        {"n_layers": 1, "embedding_multiplier": 1.0},
    ],
)
@torch.no_grad()
def test_other_shapes_of_models(save: Save, options: dict[str, Any]) -> None:
    model, folder = save(**options)
    ids = draw(2, 30)
    found, _ = cut(Engine(folder), ids, [7])
    wanted = model(torch.from_numpy(ids)).logits[:, -1].numpy()
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)


# ---- the same bits --------------------------------------------------------------------------


def test_a_text_may_be_cut_anywhere(saved: Saved) -> None:
    engine, ids = Engine(saved.folder), draw(2, 60)
    whole, state = cut(engine, ids, [])
    for cuts in (list(range(1, 60)), [1], [59], [13, 14, 40]):
        logits, other = cut(engine, ids, cuts)
        assert np.array_equal(logits, whole)
        assert same(state, other)


@pytest.mark.parametrize("length", [319, 320, 321])
def test_a_long_text_is_read_in_pieces(
    save: Save, monkeypatch: pytest.MonkeyPatch, length: int
) -> None:
    engine_, ids = Engine(save().folder), draw(3, length)
    whole, state = cut(engine_, ids, [])
    monkeypatch.setattr(engine, "_ROWS_AT_ONCE", 96)
    logits, other = cut(engine_, ids, [])
    assert np.array_equal(logits, whole)
    assert same(state, other)


def test_a_sequence_does_not_depend_on_its_batch(saved: Saved) -> None:
    engine, ids = Engine(saved.folder), draw(5, 20)
    together, state = cut(engine, ids, [3])
    for row in range(5):
        alone, other = cut(engine, ids[row : row + 1], [11])
        assert np.array_equal(together[row : row + 1], alone)
        for layer, own in zip(state.layers, other.layers, strict=True):
            assert all(np.array_equal(x[row], y[0]) for x, y in zip(layer, own, strict=True))


@pytest.mark.parametrize("threads", [2, 5])
def test_threads_change_no_bit(saved: Saved, threads: int) -> None:
    ids = draw(3, 40)
    expected, _ = cut(Engine(saved.folder, threads=1), ids, [39])
    engine = Engine(saved.folder, threads=threads)
    assert engine.threads == threads
    for _ in range(5):
        assert np.array_equal(cut(engine, ids, [39])[0], expected)


def test_vectors_of_any_length_give_the_same_bits(saved: Saved) -> None:
    ids = draw(2, 40)
    found = {isa: cut(Engine(saved.folder, isa=isa), ids, [20])[0] for isa in _engine.isas()}
    best = next(iter(found.values()))
    for isa, logits in found.items():
        assert np.array_equal(logits, best), isa


def test_threads_of_a_program_take_turns(save: Save) -> None:
    engine, ids = Engine(save("ptq_int8", "quantized").folder, threads=2), draw(8, 200)
    expected = [cut(engine, ids[row : row + 1], [])[0] for row in range(8)]
    found: dict[int, np.ndarray] = {}

    def work(row: int) -> None:
        found[row] = cut(engine, ids[row : row + 1], list(range(1, 200)))[0]

    workers = [threading.Thread(target=work, args=(row,)) for row in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert all(np.array_equal(found[row], expected[row]) for row in range(8))


def test_an_interrupted_reading_may_go_on(save: Save) -> None:
    engine, ids = Engine(save().folder), draw(1, 400_000)
    state = engine.start()

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, 0.1)
    try:
        with pytest.raises(KeyboardInterrupt):
            engine.read(state, ids)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    (read,) = state.seen
    assert read < 400_000
    rest = ids[:, read : read + 50]
    expected, _ = cut(engine, ids[:, : read + 50], [])
    assert np.array_equal(engine.read(state, rest), expected)


# ---- states ---------------------------------------------------------------------------------


def test_a_copy_goes_its_own_way(save: Save) -> None:
    engine, ids = Engine(save().folder), draw(2, 20)
    _, state = cut(engine, ids, [])
    copy = state.copy()
    assert len(copy) == 2
    assert same(state, copy)
    logits = engine.read(copy, draw(2, 3, seed=1))
    assert state.seen.tolist() == [20, 20]
    assert copy.seen.tolist() == [23, 23]
    assert np.array_equal(engine.read(state, draw(2, 3, seed=1)), logits)


def test_a_state_is_made_of_its_parts(save: Save) -> None:
    engine, ids = Engine(save().folder), draw(2, 20)
    _, state = cut(engine, ids, [])
    other = engine.resume(state.layers, state.seen)
    assert same(state, other)
    other.layers[0].taps[:] = 0  # a copy
    other.seen[:] = 0
    assert same(state, other)
    more = draw(2, 5, seed=1)
    assert np.array_equal(engine.read(state, more), engine.read(other, more))


@torch.no_grad()
def test_states_are_those_of_bkcore(save: Save) -> None:
    from bkcore.model import StreamState
    from bkcore.model.state import LayerState

    model, folder = save()
    engine, ids, more = Engine(folder), draw(2, 20), draw(2, 5, seed=1)
    _, state = cut(engine, ids, [])
    layers = [LayerState(*map(torch.from_numpy, layer)) for layer in state.layers]
    given = StreamState(tuple(layers), torch.from_numpy(state.seen))
    wanted = model(torch.from_numpy(ids), use_cache=True).cache_params
    for layer, own in zip(wanted.layers, given.layers, strict=True):
        for name in ("taps", "g", "psi"):
            torch.testing.assert_close(
                getattr(own, name), getattr(layer, name), rtol=1e-4, atol=1e-4
            )
    continued = model(torch.from_numpy(more), cache_params=given).logits[:, -1].numpy()
    np.testing.assert_allclose(engine.read(state, more), continued, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("mode", "step"), [("ptq_int8", "quantized"), (None, "float")])
@torch.no_grad()
def test_states_go_both_ways(save: Save, mode: str | None, step: str) -> None:
    """By hand, as the documentation shows it, and bit for bit."""
    from bkcore.model import StreamState
    from bkcore.model.state import LayerState

    model, folder = save(mode, step)
    engine, ids, more = Engine(folder), draw(2, 20), draw(2, 5, seed=1)
    theirs = model(torch.from_numpy(ids), use_cache=True).cache_params
    state = engine.resume(theirs.layers, theirs.seen)
    assert state.seen.tolist() == [20, 20]
    for own, layer in zip(state.layers, theirs.layers, strict=True):
        for name in own._fields:
            assert np.array_equal(getattr(own, name), getattr(layer, name).numpy())
    layers = [LayerState(*map(torch.from_numpy, layer)) for layer in state.layers]
    again = StreamState(tuple(layers), torch.from_numpy(state.seen))
    wanted = model(torch.from_numpy(more), cache_params=theirs).logits
    assert torch.equal(model(torch.from_numpy(more), cache_params=again).logits, wanted)
    found = engine.read(state, more)
    np.testing.assert_allclose(found, wanted[:, -1].numpy(), rtol=1e-4, atol=1e-4)
    for form in (tuple, list):
        assert same(engine.resume(list(map(form, state.layers)), state.seen), state)


def test_a_saved_state_is_read_by_both(save: Save, tmp_path: Path) -> None:
    from bkcore.model import StreamState

    engine = Engine(save().folder)
    _, state = cut(engine, draw(2, 20), [])
    state.save(tmp_path / "state")
    assert same(engine.load(tmp_path / "state"), state)
    theirs = StreamState.load(tmp_path / "state")
    assert theirs.seen.tolist() == [20, 20]
    assert np.array_equal(theirs.layers[1].psi.numpy(), state.layers[1].psi)
    theirs.save(tmp_path / "again")
    assert same(engine.load(tmp_path / "again"), state)


@pytest.mark.parametrize("name", ["missing", "folder", "other", "a\0b", "config.json"])
def test_a_file_that_is_no_state(save: Save, tmp_path: Path, name: str) -> None:
    engine = Engine(save().folder)
    (tmp_path / "folder").mkdir()
    Engine(save(n_layers=1).folder).start().save(tmp_path / "other")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError):
        engine.load(tmp_path / name)
    if name in ("folder", "a\0b"):
        with pytest.raises(CheckpointError):
            engine.start().save(tmp_path / name)


# ---- the process ----------------------------------------------------------------------------


def test_small_models_get_one_thread(save: Save, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save().folder
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(engine, "free_cores", lambda: 7)
    assert Engine(folder).threads == 1
    monkeypatch.setattr(engine, "_SMALL", 0)
    assert Engine(folder).threads == 7
    assert Engine(folder, threads=3).threads == 3


def test_the_environment_says_how_many_threads_a_large_model_gets(
    save: Save, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save().folder
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    monkeypatch.setattr(engine, "free_cores", lambda: 7)
    assert Engine(folder).threads == 1
    monkeypatch.setattr(engine, "_SMALL", 0)
    assert Engine(folder).threads == 5
    assert Engine(folder, threads=3).threads == 3


ALONE = """
import os, sys
from bkcore_runtime import Engine
engine = Engine(sys.argv[1], threads=2)
expected = engine.read(engine.start(), [[1, 2, 3]])
child = os.fork()
if not child:
    os._exit(int((engine.read(engine.start(), [[1, 2, 3]]) != expected).any()))
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
loaded = open("/proc/self/maps").read()
assert "_engine" in loaded
assert "gomp" not in loaded and "libomp" not in loaded, loaded
heavy = {"torch", "transformers", "safetensors", "bkcore", "tokenizers"} & sys.modules.keys()
assert not heavy, heavy
"""


@pytest.mark.skipif(sys.platform != "linux", reason="it reads /proc")
def test_an_engine_has_threads_of_its_own_and_loads_nothing_heavy(save: Save) -> None:
    command = [sys.executable, "-c", ALONE, str(save().folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


# ---- Python's lock --------------------------------------------------------------------------


def runs_meanwhile(call: Callable[[], object]) -> bool:
    """Whether another thread gets to run while this one calls, and not between two calls."""
    before = sys.getswitchinterval()
    gate, ran = threading.Lock(), threading.Event()

    def wait() -> None:
        with gate:
            ran.set()

    gate.acquire()
    sys.setswitchinterval(1000)  # so that no thread has to give way to another one
    try:
        other = threading.Thread(target=wait)
        other.start()
        gate.release()
        for _ in range(300):
            call()
            if ran.is_set():
                break
        return ran.is_set()
    finally:
        sys.setswitchinterval(before)
        other.join()


@pytest.mark.parametrize("what", ["open", "save", "load"])
def test_files_are_read_and_written_without_pythons_lock(
    save: Save, tmp_path: Path, what: str
) -> None:
    folder, path = os.fsencode(save().folder), os.fsencode(tmp_path / "state")
    native = _engine.Engine(folder, 1, "")
    state = _engine.State(native, 500)
    state.save(path)
    calls: dict[str, Callable[[], object]] = {
        "open": lambda: _engine.Engine(folder, 1, ""),
        "save": lambda: state.save(path),
        "load": lambda: native.load_state(path),
    }
    assert runs_meanwhile(calls[what])
    assert not runs_meanwhile(native.is_current)
