"""Tokenizers beside models: listed, checked, and refused if they are not the ones that were."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from bkcore import manifest
from bkcore.errors import CheckpointError, InputError
from bkcore.text import (
    encode,
    list_tokenizer,
    load_tokenizer,
    tokenizer_hash,
    train_tokenizer,
)
from bkcore.text.saved import CheckpointTokenizer, read_tokenizer

TEXT = "the slow fox sees the quick dog. " * 20


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a manifest of a model, whose files nobody is going to read."""
    with manifest.saving_model(tmp_path / "model") as staged:
        (staged / "config.json").write_text("{}")
        (staged / "model.safetensors").write_text("")
    return tmp_path / "model"


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_saved_tokenizer_is_listed_and_comes_back(folder: Path) -> None:
    tokenizer = train_tokenizer(TEXT, 300)
    names = tokenizer.save_pretrained(folder)
    assert {Path(name).name for name in names} == set(files(folder)) - {
        *("config.json", "model.safetensors", manifest.MANIFEST)
    }
    loaded = load_tokenizer(folder)
    assert type(loaded) is CheckpointTokenizer
    assert tokenizer_hash(loaded) == tokenizer_hash(tokenizer)
    assert encode(loaded, TEXT).equal(encode(tokenizer, TEXT))
    assert (loaded.bos_token, loaded.name_or_path) == ("<|endoftext|>", str(folder))
    loaded.save_pretrained(folder)  # and a loaded one lists itself, too
    assert tokenizer_hash(load_tokenizer(folder)) == tokenizer_hash(tokenizer)


def test_others_can_load_it(folder: Path) -> None:
    tokenizer = train_tokenizer(TEXT, 300)
    tokenizer.save_pretrained(folder)
    for kind in (AutoTokenizer, PreTrainedTokenizerFast):
        loaded = kind.from_pretrained(folder)
        assert type(loaded) is PreTrainedTokenizerFast
        assert tokenizer_hash(loaded) == tokenizer_hash(tokenizer)


def test_a_folder_without_a_manifest_gets_none(tmp_path: Path) -> None:
    train_tokenizer(TEXT, 300).save_pretrained(tmp_path)
    assert files(tmp_path).keys() == {"tokenizer.json", "tokenizer_config.json"}
    assert len(read_tokenizer(tmp_path)) == len(train_tokenizer(TEXT, 300))


def test_a_model_of_an_older_format_stays_one(folder: Path) -> None:
    path = folder / manifest.MANIFEST
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "format_version": manifest.FORMAT_VERSION - 1}))
    before = path.read_bytes()
    train_tokenizer(TEXT, 300).save_pretrained(folder)
    assert path.read_bytes() == before


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b"])
def test_a_name_that_cannot_be(tmp_path: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match="cannot write a checkpoint to"):
        train_tokenizer(TEXT, 280).save_pretrained(tmp_path / name)


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
def test_another_tokenizer_of_the_same_size(folder: Path, tmp_path: Path, file: str) -> None:
    train_tokenizer(TEXT, 280).save_pretrained(folder)
    other = PreTrainedTokenizerFast(
        tokenizer_object=train_tokenizer("zzz yyy " * 99, 280).backend_tokenizer, bos_token="!"
    )
    other.save_pretrained(tmp_path / "other")
    shutil.copy(tmp_path / "other" / file, folder / file)
    with pytest.raises(CheckpointError, match=f"{file} was truncated or altered"):
        load_tokenizer(folder)


def test_a_tokenizer_that_nobody_listed(folder: Path) -> None:
    plain = PreTrainedTokenizerFast(
        tokenizer_object=train_tokenizer(TEXT, 280).backend_tokenizer, bos_token="<|endoftext|>"
    )
    plain.save_pretrained(folder)
    with pytest.raises(CheckpointError, match=r"does not list tokenizer\.json.*list_tokenizer"):
        load_tokenizer(folder)
    list_tokenizer(folder)
    assert tokenizer_hash(load_tokenizer(folder)) == tokenizer_hash(plain)


def test_a_file_that_was_slipped_in(folder: Path) -> None:
    train_tokenizer(TEXT, 280).save_pretrained(folder)
    (folder / "special_tokens_map.json").write_text('{"bos_token": "!"}')
    with pytest.raises(CheckpointError, match=r"does not list special_tokens_map\.json"):
        load_tokenizer(folder)


def test_a_later_tokenizer_leaves_nothing_of_an_earlier_one(folder: Path) -> None:
    first = train_tokenizer(TEXT, 280)
    first.chat_template = "{{ messages }}"
    first.save_pretrained(folder, save_jinja_files=True)
    assert load_tokenizer(folder).chat_template == "{{ messages }}"
    (folder / "added_tokens.json").write_text("{}")
    list_tokenizer(folder)
    train_tokenizer(TEXT, 290).save_pretrained(folder)
    assert load_tokenizer(folder).chat_template is None
    assert "added_tokens.json" not in files(folder)


@pytest.mark.parametrize("with_model", [False, True])
def test_files_of_others_stay(folder: Path, tmp_path: Path, with_model: bool) -> None:
    place = folder if with_model else tmp_path / "mine"
    place.mkdir(exist_ok=True)
    names = ("vocab.json", "merges.txt", "tokenizer.model", manifest.SAMPLES)
    for name in names:
        (place / name).write_text("mine")
    train_tokenizer(TEXT, 300).save_pretrained(place)
    assert all((place / name).read_text() == "mine" for name in names)
    if with_model:
        with pytest.raises(CheckpointError, match=r"does not list vocab\.json, merges\.txt"):
            load_tokenizer(place)


def test_a_tokenizer_that_is_refused_is_not_listed(folder: Path) -> None:
    train_tokenizer(TEXT, 300).save_pretrained(folder)
    before = (folder / manifest.MANIFEST).read_bytes()
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="is damaged"):
        list_tokenizer(folder)
    assert (folder / manifest.MANIFEST).read_bytes() == before


def test_another_library_that_saves_it_again(folder: Path) -> None:
    train_tokenizer(TEXT, 300).save_pretrained(folder)
    AutoTokenizer.from_pretrained(folder).save_pretrained(folder)
    with pytest.raises(CheckpointError, match=r"altered.*bkcore\.text\.list_tokenizer\(folder\)"):
        load_tokenizer(folder)
    list_tokenizer(folder)
    load_tokenizer(folder)


def test_none_at_all(folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds no tokenizer\.json; save the tokenizer"):
        load_tokenizer(folder)
    with pytest.raises(CheckpointError, match=r"holds no tokenizer\.json"):
        list_tokenizer(folder)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("fast_tokenizer_files", ["tokenizer.9/../../outside.json"]),
        ("tokenizer_file", "/etc/passwd"),
        ("vocab_file", "/etc/passwd"),
        ("auto_map", {"AutoTokenizer": ["evil.Tokenizer", None]}),
        ("gguf_file", "x"),
        ("init_inputs", ["x"]),
    ],
)
def test_settings_that_open_other_files(folder: Path, name: str, value: Any) -> None:
    train_tokenizer(TEXT, 280).save_pretrained(folder)
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        path = folder / file
        settings = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**settings, name: value}))
        manifest.list_tokenizer(folder)
        with pytest.raises(CheckpointError, match="does not accept from a file"):
            load_tokenizer(folder)
        train_tokenizer(TEXT, 280).save_pretrained(folder)


def test_settings_of_other_libraries(folder: Path) -> None:
    train_tokenizer(TEXT, 280).save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    more = {
        **{"do_lower_case": True, "strip_accents": None, "tokenize_chinese_chars": True},
        **{"sp_model_kwargs": {}, "use_default_system_prompt": False, "vocab_file": None},
        **{"max_length": 512, "stride": 0, "truncation_strategy": "longest_first"},
    }
    path.write_text(json.dumps({**json.loads(path.read_text()), **more}))
    list_tokenizer(folder)
    loaded = load_tokenizer(folder)
    assert tokenizer_hash(loaded) == tokenizer_hash(train_tokenizer(TEXT, 280))
    assert len(encode(loaded, TEXT * 100)) > 512


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"null", b"{}", b"[" * 100_000, b'{"model": {"type": "BPE"}}', b"\xff"),
        b'{"version":"1.0","model":{"type":"BPE","vocab":{"a":0},"merges":["a b"]}}',
    ],
)
def test_a_tokenizer_that_is_none(folder: Path, content: bytes) -> None:
    train_tokenizer(TEXT, 280).save_pretrained(folder)
    (folder / "tokenizer.json").write_bytes(content)
    manifest.list_tokenizer(folder)
    with pytest.raises(CheckpointError, match="is damaged"):
        load_tokenizer(folder)


def test_an_id_beyond_all_vocabularies(folder: Path) -> None:
    """Libraries count up to it."""
    train_tokenizer(TEXT, 280).save_pretrained(folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["vocab"]["!"] = 4_000_000_000
    (folder / "tokenizer.json").write_text(json.dumps(content))
    manifest.list_tokenizer(folder)
    with pytest.raises(CheckpointError, match="the impossible token id 4,000,000,000"):
        load_tokenizer(folder)


def test_a_panic_in_rust_is_an_error_in_words(folder: Path, monkeypatch: Any) -> None:
    panic = type("PanicException", (BaseException,), {})

    def fail(*args: Any, **kwargs: Any) -> None:
        raise panic("called `Option::unwrap()` on a `None` value")

    train_tokenizer(TEXT, 280).save_pretrained(folder)
    monkeypatch.setattr(Tokenizer, "from_file", fail, raising=False)
    monkeypatch.setattr(CheckpointTokenizer, "from_pretrained", fail)
    with pytest.raises(CheckpointError, match=r"is damaged: called `Option::unwrap"):
        load_tokenizer(folder)


def test_a_full_disk(folder: Path, monkeypatch: Any) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def fail_in_rust(*args: Any, **kwargs: Any) -> None:
        raise Exception("No space left on device (os error 28)")

    tokenizer = train_tokenizer(TEXT, 280)
    tokenizer.save_pretrained(folder)
    before, other = files(folder), train_tokenizer(TEXT, 290)
    for target, how in (
        ("transformers.PreTrainedTokenizerFast._save_pretrained", fail_in_rust),
        ("pathlib.Path.write_text", fail),
        ("bkcore.manifest.os.replace", fail),
        ("bkcore.manifest.tempfile.TemporaryDirectory", fail),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(target, how)
            with pytest.raises(CheckpointError, match="No space left"):
                other.save_pretrained(folder)
        assert files(folder) == before


@pytest.mark.parametrize("options", [{"push_to_hub": True}, {"filename_prefix": "x"}])
def test_arguments_that_cannot_be_honoured(tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="would save files without the manifest"):
        train_tokenizer(TEXT, 280).save_pretrained(tmp_path, **options)
