"""Folders from strangers: what is listed is read, everything fits before it takes memory."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from bkcore import manifest
from bkcore.errors import CheckpointError
from bkcore.manifest import MANIFEST
from bkcore.model import ResNetBKConfig, ResNetBKForCausalLM
from tests.model.helpers import edit, refused, sign

# ---- the manifest ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kept", "match"),
    [
        ([], "does not list a complete model"),
        (["config.json"], "does not list a complete model"),
        (["model.safetensors"], "does not list a complete model"),
        (["generation_config.json", "model.safetensors"], "does not list a complete model"),
    ],
)
def test_an_empty_or_partial_manifest(folder: Path, kept: list[str], match: str) -> None:
    digests = {name: x for name, x in manifest.read(folder).items() if name in kept}
    (folder / MANIFEST).write_text(json.dumps({"format_version": 4, "sha256": digests}))
    refused(folder, match)


@pytest.mark.parametrize(
    "name",
    [
        "../outside.safetensors",
        "/etc/passwd",
        "a/b",
        "..",
        ".",
        "",
        "x" * 5000,
        "a\0b",
        "a\nb",
        "é" * 200,
    ],
)
def test_a_name_that_leaves_the_folder(folder: Path, name: str) -> None:
    sign(folder, **{name: "0" * 64})
    refused(folder, "which cannot name a file in this folder")


@pytest.mark.parametrize("digest", [None, 3, "", "x" * 64, "0" * 63, ["0" * 64]])
def test_a_digest_that_is_none(folder: Path, digest: Any) -> None:
    sign(folder, **{"more.json": digest})
    refused(folder, "64 hexadecimal digits")


def test_only_listed_files_are_read(folder: Path, monkeypatch: Any) -> None:
    expected = load_file(folder / "model.safetensors")
    shutil.copy(folder / "model.safetensors", folder / "model.fp16.safetensors")
    for name in ("model.safetensors.index.json", "pytorch_model.bin"):
        (folder / name).write_text("{}")
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text("raise SystemExit")
    model = ResNetBKForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert all(torch.equal(x, expected[name]) for name, x in model.state_dict().items())


def test_an_index_is_not_followed(build: Any, tmp_path: Path) -> None:
    model, other = build(), build()
    other.embedding.weight.data.zero_()
    model.save_pretrained(tmp_path / "model", max_shard_size="10KB")
    other.save_pretrained(tmp_path / "other")
    file = tmp_path / "model" / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"] = dict.fromkeys(index["weight_map"], "../other/model.safetensors")
    file.write_text(json.dumps(index))
    sign(tmp_path / "model")
    loaded = ResNetBKForCausalLM.from_pretrained(tmp_path / "model")
    assert torch.equal(loaded.embedding.weight, model.embedding.weight)


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "generation_config.json"])
def test_a_link_out_of_the_folder(folder: Path, file: str) -> None:
    shutil.move(folder / file, folder.parent / file)
    (folder / file).symlink_to(folder.parent / file)
    refused(folder, "outside the folder")


def test_the_folders_of_a_hub_have_links(folder: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    blobs = tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted(folder.iterdir())):
        shutil.copy(path, blobs / str(number))
        (snapshot / path.name).symlink_to(Path("..", "..", "blobs", str(number)))
    assert type(ResNetBKForCausalLM.from_pretrained(snapshot)) is ResNetBKForCausalLM


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", MANIFEST])
@pytest.mark.parametrize("what", ["pipe", "folder", "device", "endless file"])
def test_what_is_no_regular_file(folder: Path, file: str, what: str) -> None:
    (folder / file).unlink()
    if what == "pipe":
        os.mkfifo(folder / file)
    elif what == "folder":
        (folder / file).mkdir()
    else:
        (folder / file).symlink_to("/dev/zero" if what == "device" else "/proc/kmsg")
    refused(folder, "cannot be read|outside the folder")


@pytest.mark.parametrize("file", ["config.json", MANIFEST])
def test_a_giant_json_file(folder: Path, file: str) -> None:
    with (folder / file).open("r+b") as out:
        out.truncate(1 << 34)  # a hole, which takes no room
    refused(folder, "the limit is 16,777,216")


def test_a_file_that_changes_while_it_is_read(
    folder: Path, build: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    check, other = manifest.check, build("ptq_int4", "quantized")

    def check_and_replace(*args: Any) -> Any:
        found = check(*args)
        other.save_pretrained(folder)
        return found

    monkeypatch.setattr(manifest, "check", check_and_replace)
    refused(folder, "changed while it was being read")


@pytest.mark.parametrize("path", ["x" * 5000, "a\0b", "absent"])
def test_a_folder_that_cannot_be(path: str) -> None:
    refused(Path(path), "there is no checkpoint folder")


# ---- sizes and shapes ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        {"vocab_size": 2**31 - 1},
        {"d_model": 2**30, "expert_size": 2**30},
        {"n_layers": 10**6},
        {"n_layers": 1},
        {"num_experts": 10**6},
        {"num_experts": 2, "experts_per_token": 1},
        {"expert_size": 10**9},
        {"num_heads": 8},
        {"key_size": 10**8},
        {"value_size": 10**8},
        {"conv_width": 10**8},
        {"mixer": "green"},
        {"mixer": "convolution"},
    ],
)
def test_sizes_that_the_weights_have_not(folder: Path, fields: dict[str, Any]) -> None:
    edit(folder, **fields)
    refused(folder, "does not fit its configuration|damaged")


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("layers.0.mixer.out_proj.weight.packed", None),
        ("layers.0.mixer.out_proj.weight.packed", torch.zeros(3, 3, dtype=torch.uint8)),
        ("layers.1.experts.experts.2.up.weight.stored_scales", torch.float16),
        ("layers.1.experts.experts.2.up.weight.packed", torch.int8),
        ("embedding.weight.packed", torch.float32),
        ("layers.0.mixer.quantizers.gate.zero_points", torch.int16),
        ("layers.0.mixer.quantizers.gate.record", torch.float64),
        ("final_norm.weight", torch.int8),
    ],
)
def test_tensors_of_a_quantized_model(quantized: Path, name: str, change: Any) -> None:
    tensors = load_file(quantized / "model.safetensors")
    if change is None:
        del tensors[name]
    else:
        tensors[name] = change if isinstance(change, torch.Tensor) else tensors[name].to(change)
    save_file(tensors, quantized / "model.safetensors", metadata={"format": "pt"})
    sign(quantized)
    refused(quantized, f"does not fit its configuration.*{name}")


def header(tensors: dict[str, Any], data: bytes) -> bytes:
    text = json.dumps(tensors).encode()
    return len(text).to_bytes(8, "little") + text + data


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff" * 8,
        (1 << 40).to_bytes(8, "little") + b"{}",
        header({"a": {"dtype": "F32", "shape": [1 << 62, 8], "data_offsets": [0, 4]}}, b"0000"),
        header({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 1 << 60]}}, b"0000"),
        header(
            {name: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for name in "ab"}, b"0000"
        ),
        header({"a": {"dtype": "XX", "shape": [1], "data_offsets": [0, 4]}}, b"0000"),
        header({"final_norm.weight": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, b""),
    ],
)
def test_headers_that_are_none(folder: Path, content: bytes) -> None:
    (folder / "model.safetensors").write_bytes(content)
    sign(folder)
    refused(folder, "is damaged")


def test_the_same_tensor_twice(build: Any, tmp_path: Path) -> None:
    build().save_pretrained(tmp_path)
    shutil.copy(tmp_path / "model.safetensors", tmp_path / "model.fp16.safetensors")
    digest = manifest.read(tmp_path)["model.safetensors"]
    sign(tmp_path, **{"model.fp16.safetensors": digest})
    refused(tmp_path, "twice")


def test_nothing_large_is_built(folder: Path) -> None:
    """What a folder claims takes no memory: a process of 2 GB refuses a model of 30 TB."""
    edit(folder, vocab_size=2**31 - 1)
    code = (
        "import resource, sys\n"
        "from bkcore.errors import CheckpointError\n"
        "from bkcore.model import ResNetBKForCausalLM\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * 4096\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30),) * 2)\n"
        "try:\n"
        "    ResNetBKForCausalLM.from_pretrained(sys.argv[1])\n"
        "except CheckpointError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=False
    )
    assert "embedding.weight is (61, 24) instead of (2147483647, 24)" in done.stdout, done.stderr


# ---- what does not fit -----------------------------------------------------------------------


def test_a_configuration_of_another_model(folder: Path) -> None:
    config = ResNetBKConfig.from_pretrained(folder)
    config.vocab_size = 10**9
    refused(folder, "does not fit its configuration", config=config)


def test_another_variant(build: Any, tmp_path: Path) -> None:
    build().save_pretrained(tmp_path, variant="fp16")
    ResNetBKForCausalLM.from_pretrained(tmp_path, variant="fp16")
    refused(tmp_path, "not variant 'bf16'", variant="bf16")


def test_loading_draws_nothing_at_random(folder: Path) -> None:
    before = torch.get_rng_state()
    ResNetBKForCausalLM.from_pretrained(folder)
    assert torch.equal(torch.get_rng_state(), before)


# ---- adapters ----------------------------------------------------------------------------------


def test_a_folder_with_adapters_is_not_its_base(folder: Path, build: Any, tmp_path: Path) -> None:
    before = (folder / "model.safetensors").read_bytes()
    (folder / "adapter_config.json").write_text("{")  # nobody reads it
    for load in (ResNetBKForCausalLM.from_pretrained, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(CheckpointError, match=r"holds adapters.*model\.load_adapter\(\)"):
            load(folder)
    with pytest.raises(CheckpointError, match=r"could not be loaded again.*holds adapters"):
        build().save_pretrained(folder)
    assert (folder / "model.safetensors").read_bytes() == before
    with pytest.raises(CheckpointError, match="'adapters' holds adapters"):
        # what the auto classes ask for if a folder has nothing but adapters
        ResNetBKForCausalLM.from_pretrained(
            tmp_path, adapter_kwargs={"_adapter_model_path": "adapters"}
        )


def test_layers_that_a_deleted_adapter_left_wrapped(build: Any, tmp_path: Path) -> None:
    model, name = build(), "layers.0.mixer.in_proj.weight"
    state = model.state_dict()
    state["layers.0.mixer.in_proj.base_layer.weight"] = state.pop(name)
    with pytest.raises(CheckpointError, match=r"lacks.*in_proj.*merge_and_unload\(\)"):
        model.save_pretrained(tmp_path, state_dict=state)


@pytest.mark.parametrize(("dtype", "warned"), [(None, True), (torch.float16, False)])
def test_a_model_in_float16_is_slow_on_a_cpu(
    build: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, dtype: Any, warned: bool
) -> None:
    build().half().save_pretrained(tmp_path)
    model = ResNetBKForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert model.dtype == torch.float16
    expected = f"{tmp_path} is loaded in float16, as it is stored; on a CPU, dtype=torch.float32"
    assert (expected in caplog.text) is warned
    caplog.clear()
    assert ResNetBKForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).dtype == torch.float32
    assert not caplog.text
