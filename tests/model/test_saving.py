"""Saving over what was saved before, failing, and being killed: the old model or the new one."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from bkcore import manifest
from bkcore.errors import CheckpointError, InputError
from bkcore.model import ResNetBKForCausalLM
from bkcore.text import train_tokenizer
from tests.model.helpers import full, too_full

LAYOUTS: dict[str, tuple[tuple[str | None, str], dict[str, Any]]] = {
    "single": ((None, "float"), {}),
    "shards": ((None, "float"), {"max_shard_size": "10KB"}),
    "variant": ((None, "float"), {"variant": "fp16"}),
    "variant in shards": ((None, "float"), {"variant": "fp16", "max_shard_size": "10KB"}),
    "quantized": (("ptq_int4", "quantized"), {}),
    "calibrated in shards": (("ptq_int8", "calibrated"), {"max_shard_size": "20KB"}),
}


@pytest.fixture
def models(build: Any) -> dict[str, ResNetBKForCausalLM]:
    """A model of its own for each layout."""
    found = {}
    for number, (name, (form, _)) in enumerate(LAYOUTS.items()):
        model = found[name] = build(*form)
        if form[0] is None:
            model.embedding.weight.data.mul_(1 + number)
    found["half"] = build().half()
    return found


def save(model: ResNetBKForCausalLM, layout: str, folder: Path) -> None:
    model.save_pretrained(folder, **LAYOUTS.get(layout, (None, {}))[1])


def is_model(folder: Path, model: ResNetBKForCausalLM) -> bool:
    """Whether a folder holds this model, and no other."""
    found, own = ResNetBKForCausalLM.from_pretrained(folder).state_dict(), model.state_dict()
    return found.keys() == own.keys() and all(torch.equal(found[k], own[k]) for k in own)


def weights(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.name.startswith("model")}


@pytest.mark.parametrize("first", [*LAYOUTS, "half"])
def test_the_last_save_is_what_loads(models: Any, first: str, tmp_path: Path) -> None:
    for second in [*LAYOUTS, "half"]:
        folder = tmp_path / second
        (tmp_path / second).mkdir()
        (folder / "notes.txt").write_text("mine")
        (folder / "other.safetensors").write_text("mine")
        save(models[first], first, folder)
        save(models[second], second, folder)
        assert is_model(folder, models[second])
        save(models[second], second, tmp_path / "alone")
        assert weights(folder) == weights(tmp_path / "alone")
        assert (folder / "notes.txt").read_text() == "mine"
        assert (folder / "other.safetensors").read_text() == "mine"
        assert manifest.read(folder) == manifest.read(tmp_path / "alone")


def test_weights_of_another_library_do_not_stay(build: Any, tmp_path: Path) -> None:
    """Nothing lists them, but transformers would take them first."""
    names = ("model.safetensors", "model-00001-of-00002.safetensors")
    for name in (*names, "model.safetensors.index.json", "pytorch_model.bin"):
        (tmp_path / name).write_text("stale")
    build().save_pretrained(tmp_path, variant="fp16")
    assert weights(tmp_path) == {"model.fp16.safetensors"}
    assert (tmp_path / "pytorch_model.bin").exists()


def test_a_manifest_that_names_files_of_others_deletes_none(build: Any, tmp_path: Path) -> None:
    digest = "0" * 64
    outside = tmp_path / "outside.json"
    outside.write_text("mine")
    folder = tmp_path / "model"
    build().save_pretrained(folder)
    (folder / "notes.txt").write_text("mine")
    for name in ("../outside.json", "notes.txt"):
        listed = dict.fromkeys(("config.json", name), digest)
        content = {"format_version": 4, "sha256": listed}
        (folder / manifest.MANIFEST).write_text(json.dumps(content))
        build().save_pretrained(folder)
        ResNetBKForCausalLM.from_pretrained(folder)
    assert outside.read_text() == (folder / "notes.txt").read_text() == "mine"


class Killed(BaseException):
    """Stands for the end of the process."""


def steps(monkeypatch: pytest.MonkeyPatch, stop_at: int | None) -> Iterator[int]:
    """Count what changes a folder: renames and deletions; and stop before one of them."""
    count = 0

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            if stop_at == count:
                raise Killed
            count += 1
            return function(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", counted(os.replace))
        patch.setattr(Path, "unlink", counted(Path.unlink))
        yield 0
    yield count


PAIRS = [
    ("single", "shards"),
    ("shards", "single"),
    ("variant", "single"),
    ("single", "quantized"),
    ("quantized", "variant in shards"),
]


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_a_save_killed_at_any_step_mixes_nothing(
    models: Any, first: str, second: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = set()
    for stop_at in range(100):
        folder = tmp_path / str(stop_at)
        save(models[first], first, folder)
        counter = steps(monkeypatch, stop_at)
        next(counter)
        try:
            save(models[second], second, folder)
            finished = True
        except Killed:
            finished = False
        next(counter)
        try:
            old, new = (is_model(folder, models[name]) for name in (first, second))
            assert old or new
            seen.add("old" if old else "new")
        except CheckpointError as error:
            assert "altered" in str(error)  # noqa: PT017
            seen.add("refused")
        if finished:
            assert is_model(folder, models[second])
            break
        save(models[second], second, folder)  # and the next try mends it
        assert is_model(folder, models[second])
    assert finished
    assert {"old", "new"} <= seen


# ---- what fails ------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("target", "fails"),
    [
        ("transformers.modeling_utils.safe_save_file", too_full),
        ("transformers.modeling_utils.safe_save_file", full),
        ("bkcore.quantization.receipt_file.write", full),
        ("pathlib.Path.write_text", full),
        ("bkcore.manifest.open_regular", full),
        ("bkcore.manifest.os.replace", full),
        ("bkcore.manifest.tempfile.TemporaryDirectory", full),
    ],
)
@pytest.mark.parametrize("new", [True, False])
def test_a_full_disk_is_said_in_words(
    build: Any, target: str, fails: Any, new: bool, tmp_path: Path, monkeypatch: Any
) -> None:
    model, folder = build("ptq_int8", "quantized"), tmp_path / "model"
    if not new:
        build().save_pretrained(folder)
    before = {} if new else contents(folder)
    monkeypatch.setattr(target, fails)
    with pytest.raises(CheckpointError, match="No space left"):
        model.save_pretrained(folder)
    monkeypatch.undo()
    assert folder.exists() is not new
    assert new or contents(folder) == before


def test_what_could_not_be_loaded_is_not_saved(build: Any, tmp_path: Path) -> None:
    model = build()
    part = {name: x for name, x in model.state_dict().items() if "final_norm" not in name}
    with pytest.raises(CheckpointError, match=r"could not be loaded again.*lacks 'final_norm"):
        model.save_pretrained(tmp_path / "model", state_dict=part)
    model.config.dropout = float("nan")
    with pytest.raises(CheckpointError, match=r"could not be loaded again.*dropout"):
        model.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"push_to_hub": True}, "upload_folder"),
        ({"distributed_checkpoint": True}, "save_whole"),
        ({"variant": "../x"}, "variant must consist of"),
        ({"max_shard_size": "much"}, "nothing was saved to"),
    ],
)
def test_arguments_that_cannot_be_honoured(
    build: Any, options: Any, said: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=said):
        build().save_pretrained(tmp_path / "model", **options)
    assert not (tmp_path / "model").exists()


def test_only_the_main_process_writes(build: Any, tmp_path: Path) -> None:
    build().save_pretrained(tmp_path / "model")
    before = contents(tmp_path / "model")
    build("ptq_int4", "quantized").save_pretrained(tmp_path / "model", is_main_process=False)
    assert contents(tmp_path / "model") == before
    build().save_pretrained(tmp_path / "none", is_main_process=False)
    assert not (tmp_path / "none").exists()


# ---- the tokenizer beside it -----------------------------------------------------------------


@pytest.mark.parametrize("order", ["model first", "tokenizer first"])
def test_either_order_lists_both(build: Any, order: str, tmp_path: Path) -> None:
    tokenizer = train_tokenizer("the fox " * 20, 280)
    saves = [build().save_pretrained, tokenizer.save_pretrained]
    for one in saves if order == "model first" else reversed(saves):
        one(tmp_path)
    listed = {"config.json", "generation_config.json", "model.safetensors"}
    assert manifest.verify(tmp_path).keys() == listed | {"tokenizer.json", "tokenizer_config.json"}
    build("ptq_int4", "quantized").save_pretrained(tmp_path, max_shard_size="10KB")
    assert {"tokenizer.json", "tokenizer_config.json"} <= manifest.verify(tmp_path).keys()


def test_saving_the_model_again_does_not_hide_a_damaged_tokenizer(
    build: Any, tmp_path: Path
) -> None:
    tokenizer = train_tokenizer("the fox " * 20, 280)
    build().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    build().save_pretrained(tmp_path)
    ResNetBKForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json was truncated or altered"):
        manifest.verify(tmp_path)


def test_the_auto_class_loads_every_layout(models: Any, tmp_path: Path) -> None:
    for layout in LAYOUTS:
        save(models[layout], layout, tmp_path / layout)
        loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / layout)
        assert type(loaded) is ResNetBKForCausalLM
        own = models[layout].state_dict()
        assert all(torch.equal(x, own[name]) for name, x in loaded.state_dict().items())


def test_only_safetensors_are_written(build, tmp_path):
    with pytest.raises(InputError, match="safetensors only"):
        build().save_pretrained(tmp_path / "model", safe_serialization=False)
