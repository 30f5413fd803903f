"""Files that a stranger edited: refused in words, at once, and without asking the network.

Every round edits one file of a folder at random and makes the manifest right again, as somebody who
means harm would. `BKCORE_ATTACK_ROUNDS` sets the rounds for each file.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bkcore.commands.receipt import size, tables, training
from bkcore.errors import BKCoreError
from bkcore.evaluation.checkpoints import load_checkpoint
from bkcore.evaluation.unfinished import Unfinished
from bkcore.manifest import MANIFEST
from bkcore.model import LanguageModel, StreamState
from bkcore.model.receipt import problems
from bkcore.quantization import receipt_file
from bkcore.text import encode, train_tokenizer
from bkcore.training import resuming
from bkcore.training.recipe import read_recipe
from tests.model.helpers import sign

ROUNDS = int(os.environ.get("BKCORE_ATTACK_ROUNDS", "25"))
SECONDS = 2.0
"""No call may take longer."""

TEXT = "the slow fox sees the quick dog and the dog sees the fox. " * 40

VALUES: list[Any] = [
    *(None, True, False, 0, -1, 1, 2, 3, 7, 64, 2**31, 10**9, 10**30, -(10**30), 0.5, -0.5, 1e-300),
    *(1e308, float("nan"), float("inf"), -float("inf"), "", "x", "0", "../x", "/etc/passwd", "\0"),
    *("x" * 5000, "org/model", "float64", "int8", "quantized", "\ud800", [], {}, [[]], [None], [0]),
    *({"a": 1}, {"": None}, [1e308], [[0, 1], [2]], {"__type": "AddedToken", "content": "x"}),
]
KEYS = [
    *("foo", "dtype", "torch_dtype", "quantization_config", "auto_map", "attribute_map", "to_dict"),
    *("architectures", "id2label", "num_labels", "label2id", "problem_type", "rope_scaling", ""),
    *("attn_implementation", "experts_implementation", "_attn_implementation", "tokenizer_file"),
    *("per_layer_config", "distributed_config", "transformers_weights", "fusion_config"),
    *("text_config", "vocab_file", "gguf_file", "fast_tokenizer_files", "init_inputs", "state"),
    *("extra_special_tokens", "chat_template", "added_tokens_decoder", "bos_token", "encode"),
    *("watermarking_config", "compile_config", "max_new_tokens", "_from_model_config", "__class__"),
    *("model.safetensors", "../x", "weights", "calibration", "training", "cores", "pad_token"),
]


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of all values in a JSON value, itself apart."""
    parts = value.items() if isinstance(value, dict) else enumerate(value)
    for key, part in parts:
        yield (*path, key)
        if isinstance(part, dict | list):
            yield from places(part, (*path, key))


def edit_value(value: Any, chance: random.Random) -> Any:
    """A JSON value with something changed, taken away or added."""
    if not isinstance(value, dict | list) or chance.random() < 0.03:
        return chance.choice(VALUES)
    if chance.random() < 0.25 and isinstance(value, dict):
        return {**value, chance.choice(KEYS): chance.choice(VALUES)}
    everywhere = list(places(value))
    if not everywhere:
        return chance.choice(VALUES)
    *path, last = chance.choice(everywhere)
    holder = value
    for key in path:
        holder = holder[key]
    how = chance.random()
    if how < 0.15:
        del holder[last]
    elif how < 0.25:
        deep: Any = 1
        for _ in range(chance.choice([3, 50, 200, 900])):
            deep = [deep]
        holder[last] = deep
    elif how < 0.4 and isinstance(holder[last], int | float):
        holder[last] = holder[last] * chance.choice([-1, 2, 1000, 10**12]) + chance.choice([0, 1])
    else:
        holder[last] = chance.choice(VALUES)
    return value


def edit_bytes(content: bytes, chance: random.Random) -> bytes:
    """Bytes with some flipped, cut off, put in or repeated; mostly at the beginning."""
    data = bytearray(content)
    for _ in range(chance.choice([1, 1, 1, 2, 8])):
        end = len(data) if chance.random() < 0.5 else min(len(data), 600)
        at = chance.randrange(end) if end else 0
        how = chance.random()
        if how < 0.4 and data:
            data[at] = chance.randrange(256)
        elif how < 0.55:
            del data[at:]
        elif how < 0.7:
            data[at:at] = bytes(chance.choice([b"1e400", b"9" * 5000, b"[" * 5000, b"\xff", b"0"]))
        elif how < 0.85:
            data[at : at + chance.randrange(20)] = b""
        else:
            data[at:at] = data[at : at + chance.randrange(40)]
    return bytes(data)


def edit_json(content: bytes, chance: random.Random) -> bytes:
    if chance.random() < 0.3:
        return edit_bytes(content, chance)
    return json.dumps(edit_value(json.loads(content), chance)).encode(errors="surrogatepass")


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asks the network ends the process, so that no `except` can hide it."""

    def asked(*args: Any) -> None:
        os.write(2, f"a connection to {args[1:]} was asked for\n".encode())
        os._exit(9)

    monkeypatch.setattr(socket.socket, "connect", asked)
    monkeypatch.setattr(socket, "getaddrinfo", asked)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Small checkpoints: float in shards, quantized, and in training."""
    root = tmp_path_factory.mktemp("checkpoints")
    tokenizer = train_tokenizer(TEXT, 300)
    found = {}
    for mode in (None, "ptq_int4", "qat_int8"):
        torch.manual_seed(0)
        model = LanguageModel(
            len(tokenizer), 16, 2, 16, num_experts=2, expert_size=16, key_size=4, num_heads=2
        )
        if mode is not None:
            model.configure_quantization(mode)
            model.calibrate_quantization([torch.randint(len(tokenizer), (2, 16))])
        folder = found[str(mode)] = root / str(mode)
        model.save_pretrained(folder, max_shard_size="10KB" if mode is None else "1GB")
        tokenizer.save_pretrained(folder)
    return found


def use(folder: Path) -> None:
    """What somebody does with a folder; whatever is wrong has to come as a BKCoreError."""
    model, tokenizer = load_checkpoint(folder)
    ids = encode(tokenizer, "the fox")[None]
    if model.config.d_model == 16 and ids.numel():
        with torch.no_grad():
            model(ids)
    if model.quantization_state == "quantized":
        receipt = receipt_file.read(folder)
        _ = tables(receipt), size(receipt, folder), training(receipt), problems(receipt)


def attack(do: Callable[[random.Random], None], name: str) -> int:
    """Rounds that were refused; anything but a `BKCoreError` is a failure, and so is slowness."""
    refused = 0
    for seed in range(ROUNDS):
        said, start = "", time.process_time()
        try:
            do(random.Random(f"{name}-{seed}"))
        except BKCoreError as error:
            said = str(error)
            refused += 1
        except BaseException as error:
            raise AssertionError(f"round {seed} of {name}: {error!r:.500}") from error
        assert len(said) < 5000, f"round {seed} of {name} said {said[:500]}"
        took = time.process_time() - start
        assert took < SECONDS, f"round {seed} of {name} took {took:.1f} s"
    return refused


JSONS = [
    *[(which, "config.json") for which in ("None", "ptq_int4", "qat_int8")],
    ("None", "generation_config.json"),
    ("None", "model.safetensors.index.json"),
    ("None", "tokenizer.json"),
    ("None", "tokenizer_config.json"),
    ("None", MANIFEST),
    ("ptq_int4", "receipt.json"),
]
WEIGHTS = [
    ("None", "model-00001-*.safetensors"),
    ("ptq_int4", "model.safetensors"),
    ("qat_int8", "model.safetensors"),
]


@pytest.mark.parametrize(("which", "file"), JSONS + WEIGHTS)
def test_an_edited_file(folders: dict[str, Path], which: str, file: str, tmp_path: Path) -> None:
    edit = edit_bytes if file.endswith(".safetensors") else edit_json
    file = next(folders[which].glob(file)).name
    original = (folders[which] / file).read_bytes()
    folder = tmp_path / "edited"
    shutil.copytree(folders[which], folder)

    def one(chance: random.Random) -> None:
        (folder / MANIFEST).write_bytes((folders[which] / MANIFEST).read_bytes())
        (folder / file).write_bytes(edit(original, chance))
        if file != MANIFEST:
            sign(folder)
        use(folder)

    refused = attack(one, f"{which}/{file}")
    # Nobody reads an index: the weights say themselves what they are.
    assert refused or file == "model.safetensors.index.json"


def test_an_edited_state(tmp_path: Path) -> None:
    model = LanguageModel(32, 16, 2, 16, num_experts=2, expert_size=8, key_size=4).eval()
    ids = torch.randint(32, (2, 5))
    model(ids, use_cache=True).cache_params.save(tmp_path / "state")
    original = (tmp_path / "state").read_bytes()

    def one(chance: random.Random) -> None:
        (tmp_path / "state").write_bytes(edit_bytes(original, chance))
        with torch.no_grad():
            model(ids, cache_params=StreamState.load(tmp_path / "state"))

    assert attack(one, "state")


def test_an_edited_unfinished_evaluation(tmp_path: Path) -> None:
    unfinished = Unfinished(tmp_path, {"of": "this"})
    content = {
        "scores": {"nll": [1.5, 2.5], "tokens": [3, 4], "seconds": 0.1},
        "expert_load": [[1, 2], [3, 4]],
    }

    def one(chance: random.Random) -> None:
        unfinished.path.write_bytes(edit_json(json.dumps(content).encode(), chance))
        unfinished.load()

    assert attack(one, "unfinished")


def test_an_edited_marker(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint-3"
    resuming.begin(checkpoint)
    run = {"steps": 3, "rate": 0.1, "name": "x"}
    resuming.mark_complete(checkpoint, run, 1.5)
    original = (checkpoint / resuming.MARKER).read_bytes()

    def one(chance: random.Random) -> None:
        (checkpoint / resuming.MARKER).write_bytes(edit_json(original, chance))
        assert resuming.minutes_of(checkpoint) >= 0
        resuming.check_same_run(checkpoint, run)

    assert attack(one, "marker")


def test_an_edited_recipe(tmp_path: Path) -> None:
    original = (Path(__file__).parents[2] / "configs" / "wikitext2.yaml").read_bytes()
    more = [
        b"2001-99-99",
        b"0o9",
        b"&a [*a]",
        b"!!python/object:os.system",
        b".nan",
        b"1e400",
        b"~",
    ]
    more += [b"<<: 3", b"? [a]", b"!!int x", b"9" * 5000, b"- [" * 500, b"\t", b"!!binary x"]

    def one(chance: random.Random) -> None:
        data = edit_bytes(original, chance)
        if chance.random() < 0.5:
            at = data.find(b": ", chance.randrange(max(1, len(data)))) + 2
            data = data[:at] + chance.choice(more) + data[at:]
        (tmp_path / "recipe.yaml").write_bytes(data)
        read_recipe(tmp_path / "recipe.yaml")

    assert attack(one, "recipe")
