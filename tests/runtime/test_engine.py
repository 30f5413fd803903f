"""The engine computes what the model does, the same bits however the work is cut."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bkcore.model import ResNetBKForCausalLM
from bkcore_runtime import (
    CheckpointError,
    DTypeError,
    Engine,
    InputError,
    ShapeError,
    State,
    UnsupportedError,
    _engine,
    engine,
)
from tests.model.helpers import edit, sign
from tests.runtime.conftest import VOCABULARY, Save, Saved


def draw(batch: int, length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCABULARY, (batch, length))


def cut(engine: Engine, ids: np.ndarray, cuts: list[int]) -> tuple[np.ndarray, State]:
    """Logits after ids that are read in pieces."""
    state = engine.start(len(ids))
    for piece in np.split(ids, cuts, 1):
        logits = engine.read(state, piece)
    return logits, state


def same(first: State, second: State) -> bool:
    pairs = zip(first.layers, second.layers, strict=True)
    return (first.seen == second.seen).all() and all(
        np.array_equal(*fields) for layers in pairs for fields in zip(*layers, strict=True)
    )


# ---- what it computes -----------------------------------------------------------------------


@torch.no_grad()
def test_logits_are_those_of_the_model(saved: Saved) -> None:
    """Float functions of PyTorch round differently; behind codes that is a step at most."""
    engine = Engine(saved.folder)
    ids = draw(3, 50)
    found = [cut(engine, ids[:, :length], [])[0] for length in range(1, 51)]
    wanted = saved.model(torch.from_numpy(ids)).logits.transpose(0, 1)
    assert np.array_equal(np.argmax(found, -1), wanted.argmax(-1).numpy())
    close = np.isclose(found, wanted.numpy(), rtol=1e-4, atol=1e-4)
    assert close.mean() > (0.9 if saved.model.quantization_state == "quantized" else 0.99999)


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


def test_a_long_text_is_read_in_pieces(save: Save, monkeypatch: pytest.MonkeyPatch) -> None:
    engine_, ids = Engine(save().folder), draw(3, 1000)
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
    """The plain instruction set has no fused multiply-add."""
    ids = draw(2, 40)
    found = {isa: cut(Engine(saved.folder, isa=isa), ids, [20])[0] for isa in _engine.isas()}
    best = next(iter(found.values()))
    for isa, logits in found.items():
        if isa != "baseline":
            assert np.array_equal(logits, best), isa
    if saved.model.quantization_state != "quantized":
        np.testing.assert_allclose(found["baseline"], best, rtol=1e-4, atol=1e-4)
    assert np.array_equal(found["baseline"].argmax(-1), best.argmax(-1))


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


# ---- what is refused ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "error", "match"),
    [
        ([[0, VOCABULARY]], InputError, rf"token {VOCABULARY} is not in \[0, {VOCABULARY}\)"),
        ([[-1]], InputError, "token -1 is not"),
        ([[0], [1]], ShapeError, r"tokens must be \(1, N\), N >= 1, not \(2, 1\)"),
        (np.zeros((1, 0), int), ShapeError, r"not \(1, 0\)"),
        ([0, 1], ShapeError, r"not \(2,\)"),
        (3, ShapeError, r"not \(\)"),
        ([[0, 1], [1]], ShapeError, "rows of one length"),
        ([[0.0]], DTypeError, "must be integers that fit int64, not float64"),
        ([[True]], DTypeError, "not bool"),
        ([["a"]], DTypeError, "must be integers"),
        ([[None]], DTypeError, "not object"),
        ([[2**64]], DTypeError, "must be integers"),
        ([[2**63]], DTypeError, "not uint64"),
    ],
)
def test_tokens_that_cannot_be(save: Save, tokens: Any, error: type[Exception], match: str) -> None:
    engine = Engine(save().folder)
    _, state = cut(engine, draw(1, 5), [])
    before = state.copy()
    with pytest.raises(error, match=match):
        engine.read(state, tokens)
    assert same(state, before)


def test_tokens_of_any_integer_type(save: Save) -> None:
    engine, ids = Engine(save().folder), draw(2, 9)
    expected, _ = cut(engine, ids, [])
    for form in (ids.astype(np.uint8), ids.astype(np.int32), ids.tolist(), np.asfortranarray(ids)):
        assert np.array_equal(engine.read(engine.start(2), form), expected)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"threads": 0}, "threads must be from 1 to 1024, not 0"),
        ({"threads": 1025}, "threads must be from 1 to 1024"),
        ({"threads": 10**6000}, "threads must be from 1 to 1024"),
        ({"threads": 1.5}, "threads must be an integer, not 1.5"),
        ({"threads": True}, "threads must be an integer"),
        ({"isa": "avx1024"}, "isa must be one of .*baseline on this processor, not 'avx1024'"),
        ({"isa": ""}, "isa must be one of"),
        ({"isa": 3}, "isa must be one of"),
    ],
)
def test_options_that_cannot_be(save: Save, options: dict[str, Any], match: str) -> None:
    with pytest.raises(InputError, match=match):
        Engine(save().folder, **options)


@pytest.mark.parametrize("batch", [0, -1, 2**20 + 1, 10**30, 1.0, True, None])
def test_batches_that_cannot_be(save: Save, batch: Any) -> None:
    with pytest.raises(InputError, match="batch must"):
        Engine(save().folder).start(batch)


def test_parts_that_make_no_state(save: Save) -> None:
    engine = Engine(save().folder)
    _, state = cut(engine, draw(2, 5), [])
    first, second = state.layers
    cases: list[tuple[Any, Any, type[Exception]]] = [
        ([first], state.seen, ShapeError),
        ([first, second._replace(g=second.g[:1])], state.seen, ShapeError),
        ([first, second._replace(g=second.g.astype(np.float64))], state.seen, DTypeError),
        ([first, second], [5], ShapeError),
        ([first, second], [5, -1], ShapeError),
        ([first, second], np.zeros(0, int), ShapeError),
        ([first, second], 5, ShapeError),
        ([first, second], [0.5, 1.0], DTypeError),
    ]
    for layers, seen, error in cases:
        with pytest.raises(error):
            engine.resume(layers, seen)


def test_the_state_of_another_model(save: Save) -> None:
    engine, other = Engine(save().folder), Engine(save(key_size=5).folder)
    with pytest.raises(InputError, match="other sizes"):
        engine.read(other.start(), [[1]])
    twin = Engine(save(num_experts=2).folder)
    assert engine.read(twin.start(), [[1]]).shape == (1, VOCABULARY)


# ---- checkpoints ----------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("how", ["altered", "shortened", "missing", "unlisted"])
def test_a_damaged_checkpoint_is_refused_as_bkcore_does(save: Save, file: str, how: str) -> None:
    folder = save().folder
    content = (folder / file).read_bytes()
    if how == "altered":
        (folder / file).write_bytes(content.replace(b"0", b"1"))
    elif how == "shortened":
        (folder / file).write_bytes(content[:-1])
    elif how == "missing":
        (folder / file).unlink()
    else:
        manifest = folder / "bkcore.json"
        manifest.write_text(manifest.read_text().replace(f'"{file}"', '"other.txt"'))
    with pytest.raises(CheckpointError) as own:
        Engine(folder)
    with pytest.raises(CheckpointError) as theirs:
        ResNetBKForCausalLM.from_pretrained(folder)
    assert str(own.value) == str(theirs.value)
    assert not isinstance(own.value, UnsupportedError)


@pytest.mark.parametrize("name", ["nothing", "nul\0", "x" * 5000])
def test_no_checkpoint(tmp_path: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match="there is no checkpoint folder"):
        Engine(tmp_path / name)


def test_a_configuration_of_another_model(save: Save) -> None:
    folder = save().folder
    edit(folder, n_layers=1)
    with pytest.raises(CheckpointError, match=r"model\.safetensors does not fit"):
        Engine(folder)
    edit(folder, model_type="llama")
    with pytest.raises(CheckpointError, match="model_type is not resnet_bk"):
        Engine(folder)


@pytest.mark.parametrize(
    ("mode", "state", "options", "match"),
    [
        (None, "float", {"mixer": "convolution"}, "the mixer is not resolvent"),
        ("qat_int8", "training", {}, "is training"),
        ("ptq_int4", "calibrated", {}, "is calibrated"),
    ],
)
def test_what_only_pytorch_runs(
    save: Save, mode: str | None, state: str, options: dict[str, Any], match: str
) -> None:
    with pytest.raises(UnsupportedError, match=f"the engine does not read.*{match}"):
        Engine(save(mode, state, **options).folder)


def test_weights_that_only_pytorch_reads(save: Save, tmp_path: Path) -> None:
    model = save().model
    model.double().save_pretrained(tmp_path / "double")
    with pytest.raises(UnsupportedError, match="has dtype F64"):
        Engine(tmp_path / "double")
    model.float().save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    with pytest.raises(UnsupportedError, match="model-00001-of"):
        Engine(tmp_path / "shards")
    folder = save().folder
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(UnsupportedError, match="adapters"):
        Engine(folder)


def test_a_checkpoint_that_changes_meanwhile(save: Save, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, other = save().folder, save().folder
    native = _engine.Engine

    def replace(*arguments: Any) -> _engine.Engine:
        os.replace(other / "model.safetensors", folder / "model.safetensors")
        return native(*arguments)

    monkeypatch.setattr(_engine, "Engine", replace)
    with pytest.raises(CheckpointError, match="changed while it was being read"):
        Engine(folder)


def test_a_folder_whose_name_is_no_text(save: Save, tmp_path: Path) -> None:
    name = os.fsdecode(b"\xff\xfe")
    os.rename(save().folder, tmp_path / name)
    assert Engine(tmp_path / name).vocabulary == VOCABULARY
    edit(tmp_path / name, n_layers=1)
    with pytest.raises(CheckpointError, match=r"\\xff.*does not fit|\?\?.*does not fit"):
        Engine(tmp_path / name)


@pytest.mark.parametrize(("ids", "stop"), [(None, ()), (3, (3,)), ([3, 5], (3, 5))])
def test_what_ends_a_text(save: Save, ids: Any, stop: tuple[int, ...]) -> None:
    folder = save().folder
    edit(folder, "generation_config.json", eos_token_id=ids)
    assert Engine(folder).stop == stop
    (folder / "generation_config.json").unlink()
    sign_without(folder, "generation_config.json")
    edit(folder, eos_token_id=ids)
    assert Engine(folder).stop == stop


def sign_without(folder: Path, name: str) -> None:
    import json

    content = json.loads((folder / "bkcore.json").read_text())
    del content["sha256"][name]
    (folder / "bkcore.json").write_text(json.dumps(content))
    sign(folder)


# ---- the process ----------------------------------------------------------------------------


def test_small_models_get_one_thread(save: Save, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save().folder
    monkeypatch.setattr(engine, "free_cores", lambda: 7)
    assert Engine(folder).threads == 1
    monkeypatch.setattr(engine, "_SMALL", 0)
    assert Engine(folder).threads == 7
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
