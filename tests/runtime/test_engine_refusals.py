"""What the engine refuses: tokens, options, states and checkpoints."""

from __future__ import annotations

import json
import os
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
    UnsupportedError,
    _engine,
)
from tests.model.helpers import edit, sign
from tests.runtime.conftest import VOCABULARY, Save, cut, draw, same

# ---- arguments ------------------------------------------------------------------------------


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
        ([[True, 2]], DTypeError, "not bool"),
        ([[2, np.True_]], DTypeError, "not bool"),
        ([np.array([True, False])], DTypeError, "not bool"),
        ([[]], ShapeError, r"not \(1, 0\)"),
        ([], ShapeError, r"not \(0,\)"),
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


def test_a_refused_token_at_the_end_of_a_long_text_changes_nothing(save: Save) -> None:
    engine = Engine(save().folder)
    state, text = engine.start(), draw(1, 5000)
    text[0, -1] = VOCABULARY
    with pytest.raises(InputError, match=f"token {VOCABULARY} is not"):
        engine.read(state, text)
    assert same(state, engine.start())


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
    parts: Any = second._replace
    cases: list[tuple[Any, Any, type[Exception]]] = [
        ([first], state.seen, ShapeError),
        ([first, second._replace(g=second.g[:1])], state.seen, ShapeError),
        ([first, second._replace(g=second.g.astype(np.float64))], state.seen, DTypeError),
        ([first, second], [5], ShapeError),
        ([first, second], [5, -1], ShapeError),
        ([first, second], np.zeros(0, int), ShapeError),
        ([first, second], 5, ShapeError),
        ([first, second], [0.5, 1.0], DTypeError),
        ([first, second], [5, 2**62 + 1], InputError),
        ([first, second], [2**63 - 1, 5], InputError),
        ([first, second], [True, 1], DTypeError),
        ([first, second], [], ShapeError),
        ([first, second[:2]], state.seen, ShapeError),
        ([first, None], state.seen, ShapeError),
        ([first, parts(g=None)], state.seen, DTypeError),
        ([first, parts(g=[[0.0], []])], state.seen, ShapeError),
        (
            [first, parts(g=torch.tensor(second.g, requires_grad=True))],
            state.seen,
            DTypeError,
        ),
        (state, state.seen, DTypeError),
        (None, state.seen, DTypeError),
    ]
    for layers, seen, error in cases:
        with pytest.raises(error):
            engine.resume(layers, seen)


def test_a_sequence_that_has_read_too_much_reads_no_more(save: Save) -> None:
    engine = Engine(save().folder)
    state = engine.resume(engine.start(2).layers, [0, 2**62 - 1])
    before = state.copy()
    with pytest.raises(InputError, match=r"2\^62"):
        engine.read(state, [[1, 2], [1, 2]])
    assert same(state, before)
    engine.read(state, [[1], [2]])
    assert state.seen.tolist() == [1, 2**62]


def test_the_state_of_another_model(save: Save) -> None:
    engine, other = Engine(save().folder), Engine(save(key_size=5).folder)
    with pytest.raises(ShapeError, match="other sizes"):
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


@pytest.mark.parametrize(
    "change",
    [
        {"mode": "ptq_int4 "},
        {"mode": "banana"},
        {"mode": None},
        {"state": None},
        {"state": "calibrating"},
        {"nonuniform": False},
        {"nonuniform": 1},
        {"per_channel": False},
        {"group_size": None},
        {"groupsize": 8},
    ],
    ids=str,
)
def test_a_quantization_that_bkcore_refuses(save: Save, change: dict[str, Any]) -> None:
    folder = save("ptq_int4", "quantized").folder
    form = json.loads((folder / "config.json").read_text())["quantization"]
    edit(folder, quantization=form | change)
    with pytest.raises(CheckpointError):
        ResNetBKForCausalLM.from_pretrained(folder)
    with pytest.raises(CheckpointError) as own:
        Engine(folder)
    assert not isinstance(own.value, UnsupportedError)


@pytest.mark.parametrize("name", ["n_layers", "d_model", "conv_width", "norm_eps", "mixer"])
def test_null_that_bkcore_refuses(save: Save, name: str) -> None:
    folder = save().folder
    change: Any = {name: None}
    edit(folder, **change)
    for load in (Engine, ResNetBKForCausalLM.from_pretrained):
        with pytest.raises(CheckpointError):
            load(folder)


def test_quantization_that_leaves_out_what_has_a_default(save: Save) -> None:
    saved, ids = save("ptq_int8", "quantized"), draw(1, 9)
    wanted, _ = cut(Engine(saved.folder), ids, [])
    form = json.loads((saved.folder / "config.json").read_text())["quantization"]
    edit(saved.folder, quantization={k: form[k] for k in form if k not in ("mode", "nonuniform")})
    assert ResNetBKForCausalLM.from_pretrained(saved.folder).quantization_state == "quantized"
    assert np.array_equal(cut(Engine(saved.folder), ids, [])[0], wanted)
    folder = save().folder
    edit(folder, quantization={"mode": "ptq_int4"})
    assert ResNetBKForCausalLM.from_pretrained(folder).quantization_state == "float"
    assert Engine(folder).read(Engine(folder).start(), ids).shape == (1, VOCABULARY)


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


@pytest.mark.parametrize("how", ["another blob", "no blob"])
def test_a_link_that_changes_meanwhile(
    save: Save, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, how: str
) -> None:
    """As in a hub's cache, whose files are links to blobs."""
    folder, other = save().folder, save(embedding_multiplier=3.0).folder
    place = tmp_path / "hub" / "snapshots" / "main"
    blobs = tmp_path / "hub" / "blobs"
    place.parent.mkdir(parents=True)
    folder.rename(place)
    blobs.mkdir()
    link = place / "config.json"
    link.rename(blobs / "first")
    (other / "config.json").rename(blobs / "second")
    link.symlink_to(blobs / "first")
    Engine(place)
    native = _engine.Engine

    def replace(*arguments: Any) -> _engine.Engine:
        if how == "another blob":
            link.unlink()
            link.symlink_to(blobs / "second")
            return native(*arguments)
        made = native(*arguments)
        (blobs / "first").unlink()
        return made

    monkeypatch.setattr(_engine, "Engine", replace)
    with pytest.raises(CheckpointError, match="changed while it was being read"):
        Engine(place)


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


@pytest.mark.parametrize("ids", [True, "7", 2.9, [3, None], [[3]], {}])
@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
def test_ends_that_cannot_be(save: Save, file: str, ids: Any) -> None:
    folder = save().folder
    if file == "config.json":
        (folder / "generation_config.json").unlink()
        sign_without(folder, "generation_config.json")
    edit(folder, file, eos_token_id=ids)
    with pytest.raises(CheckpointError, match=rf"eos_token_id in .*{file} cannot be "):
        Engine(folder)


def sign_without(folder: Path, name: str) -> None:
    content = json.loads((folder / "bkcore.json").read_text())
    del content["sha256"][name]
    (folder / "bkcore.json").write_text(json.dumps(content))
    sign(folder)
