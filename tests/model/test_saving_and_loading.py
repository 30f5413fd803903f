"""Checkpoints: bit for bit, whole or not at all, and refused when damaged."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from bkcore.errors import CheckpointError, LifecycleError
from bkcore.manifest import FORMAT_VERSION, MANIFEST, RECEIPT, model_bytes
from bkcore.model import ResNetBKForCausalLM


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def saved(build, tmp_path):
    """A folder with a quantized model, and the model."""
    model = build("ptq_int4", "quantized")
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model", model


@torch.no_grad()
def test_round_trip_is_bit_for_bit(build, tokens, form, tmp_path):
    model = build(*form)
    ids = tokens(2, 50)
    expected = model(ids).logits
    model.save_pretrained(tmp_path)
    for loader in (ResNetBKForCausalLM, AutoModelForCausalLM):
        loaded = loader.from_pretrained(tmp_path)
        assert type(loaded) is ResNetBKForCausalLM
        assert not loaded.training
        assert loaded.quantization_state is model.quantization_state
        assert loaded.quant_config == model.quant_config
        assert loaded.calibrated == model.calibrated
        assert torch.equal(loaded(ids).logits, expected)
        tensors = model.state_dict()
        assert loaded.state_dict().keys() == tensors.keys()
        for name, tensor in loaded.state_dict().items():
            assert tensor.dtype == tensors[name].dtype
            assert torch.equal(tensor, tensors[name])
        trainable = {name for name, p in model.named_parameters() if p.requires_grad}
        assert {name for name, p in loaded.named_parameters() if p.requires_grad} == trainable


@torch.no_grad()
def test_the_lifecycle_goes_on_after_loading(build, tokens, form, tmp_path):
    mode, state = form
    model = build(*form)
    model.save_pretrained(tmp_path)
    models = [model, ResNetBKForCausalLM.from_pretrained(tmp_path)]
    batches = [tokens(2, 16), tokens(3, 20)]
    for one in models:
        if mode is not None and state == "float":
            one.calibrate_quantization(batches)
        elif state == "calibrated":
            one.enable_qat() if mode.startswith("qat") else one.apply_ptq()
        if one.quantization_state == "training":
            one.convert()
    assert models[0].quantization_state is models[1].quantization_state
    assert models[0].quantization_state == ("float" if mode is None else "quantized")
    ids = tokens(2, 40)
    assert torch.equal(models[0](ids).logits, models[1](ids).logits)


def test_saving_again_gives_the_same_bytes(build, form, tmp_path):
    build(*form).save_pretrained(tmp_path / "one")
    first = contents(tmp_path / "one")
    assert {"config.json", "model.safetensors", MANIFEST} <= first.keys()
    loaded = ResNetBKForCausalLM.from_pretrained(tmp_path / "one")
    loaded.save_pretrained(tmp_path / "two")
    loaded.save_pretrained(tmp_path / "one")
    second, over = contents(tmp_path / "two"), contents(tmp_path / "one")
    assert second["model.safetensors"] == first["model.safetensors"]
    assert over == second
    assert {name: len(data) for name, data in second.items()} == {
        name: len(data) for name, data in first.items()
    }


def test_quantized_files_are_smaller_by_the_promised_ratio(build, tmp_path):
    sizes = {}
    for mode, state in ((None, "float"), ("ptq_int8", "quantized"), ("ptq_int4", "quantized")):
        model = build(mode, state)
        folder = tmp_path / str(mode)
        model.save_pretrained(folder)
        sizes[mode] = (folder / "model.safetensors").stat().st_size
        header = int.from_bytes((folder / "model.safetensors").read_bytes()[:8], "little")
        tensors = sum(t.numel() * t.element_size() for t in model.state_dict().values())
        assert sizes[mode] == 8 + header + tensors
        if mode is not None:
            assert tensors == model.estimate_model_size()["quantized_bytes"]
        assert model_bytes(folder) == sum(
            len(data) for name, data in contents(folder).items() if name not in (MANIFEST, RECEIPT)
        )
    assert sizes["ptq_int4"] < sizes["ptq_int8"] < sizes[None]


def test_other_files_in_the_folder_are_left_alone(build, tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    build().save_pretrained(tmp_path)
    assert (tmp_path / "tokenizer.json").read_text() == "{}"
    ResNetBKForCausalLM.from_pretrained(tmp_path)
    assert not list(tmp_path.glob(".saving*"))


# ---- damage --------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_a_truncated_file(saved, keep):
    path = saved[0] / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"model\.safetensors was truncated or altered"):
        ResNetBKForCausalLM.from_pretrained(saved[0])


@pytest.mark.parametrize("where", [0.0, 0.3, 0.999])
@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_a_flipped_bit(saved, file, where):
    path = saved[0] / file
    data = bytearray(path.read_bytes())
    data[int(where * len(data))] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(CheckpointError, match=f"{file} was truncated or altered"):
        ResNetBKForCausalLM.from_pretrained(saved[0])


def test_an_altered_config(saved):
    path = saved[0] / "config.json"
    path.write_text(path.read_text().replace("ptq_int4", "ptq_int8"))
    with pytest.raises(CheckpointError, match=r"config\.json was truncated or altered"):
        ResNetBKForCausalLM.from_pretrained(saved[0])


@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_a_missing_file(saved, file):
    (saved[0] / file).unlink()
    with pytest.raises(CheckpointError, match=f"lacks the file {file}"):
        ResNetBKForCausalLM.from_pretrained(saved[0])


def test_others_may_read_what_the_umask_lets_them(build, tmp_path):
    before = os.umask(0o027)
    try:
        build().save_pretrained(tmp_path)
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    assert set(modes.values()) == {0o640}, modes


def test_a_missing_manifest(saved):
    (saved[0] / MANIFEST).unlink()
    with pytest.raises(CheckpointError, match=f"not a bkcore checkpoint; it has no {MANIFEST}"):
        ResNetBKForCausalLM.from_pretrained(saved[0])


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"format_version": "new", "sha256": {}}', "\udc80"]
)
def test_an_unreadable_manifest(saved, text):
    (saved[0] / MANIFEST).write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(CheckpointError, match=f"{MANIFEST} cannot be read"):
        ResNetBKForCausalLM.from_pretrained(saved[0])


@pytest.mark.parametrize(("off", "remedy"), [(1, "install a newer bkcore"), (-1, "train it again")])
def test_another_format(saved, off, remedy):
    manifest = json.loads((saved[0] / MANIFEST).read_text())
    manifest["format_version"] = FORMAT_VERSION + off
    (saved[0] / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=remedy):
        ResNetBKForCausalLM.from_pretrained(saved[0])


@pytest.mark.parametrize("change", ["missing tensor", "other shape"])
def test_tensors_that_do_not_fit_the_config(saved, change):
    """Even with checksums that match, as a tool that edits checkpoints would leave them."""
    from safetensors.torch import load_file, save_file

    folder, _ = saved
    tensors = load_file(folder / "model.safetensors")
    if change == "missing tensor":
        del tensors["final_norm.weight"]
    else:
        tensors["final_norm.weight"] = torch.ones(5)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    manifest = json.loads((folder / MANIFEST).read_text())
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    manifest["sha256"]["model.safetensors"] = digest
    (folder / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=r"does not fit its configuration.*final_norm"):
        ResNetBKForCausalLM.from_pretrained(folder)


def test_no_such_folder(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint folder"):
        ResNetBKForCausalLM.from_pretrained(tmp_path / "absent")
    with pytest.raises(CheckpointError, match="not a bkcore checkpoint"):
        ResNetBKForCausalLM.from_pretrained(tmp_path)


# ---- saving that fails ---------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("when", ["before", "midway", "after"])
def test_a_failing_save_leaves_the_old_checkpoint(saved, build, tokens, monkeypatch, when):
    folder, model = saved
    before, ids = contents(folder), tokens(1, 9)
    write = PreTrainedModel.save_pretrained

    def fail(self, target, *args, **kwargs):
        if when == "midway":
            (Path(target) / "model.safetensors").write_bytes(b"half of the te")
        elif when == "after":
            write(self, target, *args, **kwargs)
        raise OSError("no space left on device")

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", fail)
    with pytest.raises(CheckpointError, match="no space left"):
        build("ptq_int8", "quantized").save_pretrained(folder)
    monkeypatch.undo()
    assert contents(folder) == before
    loaded = ResNetBKForCausalLM.from_pretrained(folder)
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_a_save_that_is_killed_between_its_renames_is_noticed(saved, build, monkeypatch):
    """The folder then holds files of two checkpoints; loading must say so, not mix them."""
    folder, _ = saved
    import os

    rename, done = os.replace, list[str]()

    def replace_one(source, target):
        if str(target).startswith(str(folder)) and done:
            raise KeyboardInterrupt
        rename(source, target)
        done.append(target)

    monkeypatch.setattr("bkcore.manifest.os.replace", replace_one)
    with pytest.raises(KeyboardInterrupt):
        build("ptq_int8", "quantized").save_pretrained(folder)
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="truncated or altered"):
        ResNetBKForCausalLM.from_pretrained(folder)


def test_saving_to_a_file_or_below_one(build, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="is a file"):
        build().save_pretrained(tmp_path / "file")
    with pytest.raises(CheckpointError, match="cannot write a checkpoint"):
        build().save_pretrained(tmp_path / "file" / "below")


def test_saving_during_calibration(build, tmp_path):
    model = build("ptq_int8")
    model.start_calibration()
    with pytest.raises(LifecycleError, match=r"call end_calibration\(\) first"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_first_call_in_inference_mode_leaves_nothing_that_no_graph_may_hold(
    build, executed_form, tokens, tmp_path
):
    """What is remembered from the first call may be used by later ones that keep a graph."""
    mode, state = executed_form
    if state == "training":
        pytest.skip("trained through codes, it is saved after its conversion")
    build(mode, state).save_pretrained(tmp_path)
    model, ids = ResNetBKForCausalLM.from_pretrained(tmp_path).eval(), tokens(2, 9)
    with torch.inference_mode():
        first = model(ids).logits
    # A float model takes PyTorch's own functions where there may be a gradient.
    bound = 1e-5 if state == "float" else 0.0
    torch.testing.assert_close(model(ids).logits, first, rtol=bound, atol=bound)
