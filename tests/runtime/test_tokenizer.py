"""Text in and out, and characters that come in parts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers.decoders import Fuse, Replace, Sequence
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from bkcore.text import load_tokenizer
from bkcore_runtime import (
    CheckpointError,
    DTypeError,
    InputError,
    Tokenizer,
    UnsupportedError,
    load,
)
from tests.model.helpers import edit, sign
from tests.runtime.conftest import SHIPPED, TEXT, Save

TEXTS = [TEXT[:300], " leading", "a\nb\r\n\t", "Ünïcödé 狐狸 🦊👩‍👩‍👧", "<|endoftext|>x", " "]


@pytest.mark.parametrize("text", TEXTS)
def test_texts_are_encoded_as_transformers_does(whole: Path, text: str) -> None:
    for folder in (whole, SHIPPED):
        tokenizer, theirs = Tokenizer(folder), load_tokenizer(folder)
        ids = tokenizer.encode(text)
        assert ids == theirs(text)["input_ids"]
        assert tokenizer.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


@given(ids=st.lists(st.integers(0, 2047), max_size=40), after=st.integers(0, 40))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_pieces_make_the_whole_text(shipped, ids: list[int], after: int) -> None:
    """Any ids, such as a careless model makes: parts of characters and special tokens, too."""
    tokenizer = shipped[1]
    before = tokenizer.encode(TEXTS[3])[:after]
    pieces = list(tokenizer.stream(iter(ids), after=before))
    assert all(pieces)
    told = tokenizer.decode(before).rstrip("\ufffd")  # without a part of a character
    assert told + "".join(pieces) == tokenizer.decode(before + ids)


@pytest.mark.parametrize(
    "text",
    ["Zoë – é!", "a狐狸", "🦊👩‍👩‍👧 x", "\ufffd", "a\ufffdb\ufffd", "\ufffd\ufffd🦊\ufffd é"],
)
def test_a_text_may_be_continued_anywhere(shipped, text: str) -> None:
    """What was complete before does not come again, and the rest of a character is not lost."""
    tokenizer = shipped[1]
    ids = tokenizer.encode(text)
    tokens = [tokenizer._tokenizer.id_to_token(each) for each in ids]
    for cut in range(len(ids) + 1):
        count = len("".join(tokens[:cut]))  # a token has a character for each byte
        told = text.encode()[:count].decode(errors="ignore")
        pieces = list(tokenizer.stream(iter(ids[cut:]), after=ids[:cut]))
        assert all(pieces)
        assert told + "".join(pieces) == text


def test_ids_of_a_stream_are_checked(shipped) -> None:
    for ids, after in (([-1], ()), ((), [-1]), ([2**40], ())):
        with pytest.raises(InputError, match="ids must be from 0"):
            list(shipped[1].stream(ids, after=after))
    wrong: list[Any] = [2.0, True, "7", None]
    for each in wrong:
        with pytest.raises(DTypeError, match="ids must be integers"):
            list(shipped[1].stream([each]))


def test_no_character_comes_in_parts(shipped) -> None:
    tokenizer = shipped[1]
    text = "狐狸 – 🦊👩‍👩‍👧 Zoë"
    ids = tokenizer.encode(text)
    assert len(ids) > len(text)  # most characters have several tokens
    pieces = list(tokenizer.stream(ids))
    assert "".join(pieces) == text
    assert "\ufffd" not in "".join(pieces)
    cut = list(tokenizer.stream(ids[:1]))
    assert cut == ["\ufffd"]  # what the end leaves incomplete


def test_pieces_come_as_soon_as_they_can(shipped) -> None:
    tokenizer = shipped[1]
    ids = tokenizer.encode("The river rises")
    asked: list[int] = []

    def asking():
        for each in ids:
            asked.append(each)
            yield each

    pieces = tokenizer.stream(asking())
    for count in range(1, len(ids) + 1):
        assert next(pieces)
        assert len(asked) == count


@pytest.mark.parametrize(
    ("text", "error", "match"),
    [
        ("", InputError, "the prompt is empty"),
        ("\ud800", InputError, "the prompt .* is not valid UTF-8 text"),
        (None, DTypeError, "the prompt must be a str, not None"),
        (3, DTypeError, "the prompt must be a str, not 3"),
        (b"hi", DTypeError, "the prompt must be a str, not b'hi'"),
    ],
)
def test_texts_that_cannot_be(shipped, text, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        shipped[1].encode(text)


def test_a_long_text_is_not_shown_whole(shipped) -> None:
    with pytest.raises(InputError, match="is not valid UTF-8 text") as caught:
        shipped[1].encode("x" * 100_000 + "\ud800")
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("ids", [[-1], [2**40]])
def test_ids_that_cannot_be(shipped, ids: list[int]) -> None:
    with pytest.raises(InputError, match=r"ids must be from 0"):
        shipped[1].decode(ids)


@pytest.mark.parametrize("ids", [[2.9], ["7"], [True], [None], np.array([1.5])])
def test_what_is_no_id(shipped, ids: Any) -> None:
    with pytest.raises(DTypeError, match="ids must be integers"):
        shipped[1].decode(ids)


def test_ids_may_be_those_of_numpy_and_pytorch(shipped) -> None:
    tokenizer = shipped[1]
    ids = tokenizer.encode("The river")
    for form in (tuple(ids), iter(ids), np.array(ids), list(np.array(ids)), torch.tensor(ids)):
        assert tokenizer.decode(form) == "The river"
    assert tokenizer.decode([]) == ""


def test_what_a_tokenizer_cannot_do_is_a_sentence(whole: Path) -> None:
    """One of words, without a token for those that it does not know."""
    words = tokenizers.Tokenizer(WordLevel({"the": 0, "fox": 1}, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    words.save(str(whole / "tokenizer.json"))
    sign(whole)
    tokenizer = Tokenizer(whole)
    assert tokenizer.decode(tokenizer.encode("the fox")) == "the fox"
    with pytest.raises(CheckpointError, match=r"the tokenizer in .* is damaged: .*\[UNK\]"):
        tokenizer.encode("the dog")


def test_pieces_that_cannot_be_are_a_sentence(whole: Path) -> None:
    """A later token changes earlier text."""
    words = tokenizers.Tokenizer(WordLevel({"a": 0, "b": 1}, unk_token="a"))
    words.decoder = Sequence([Fuse(), Replace("ab", "cde")])
    words.save(str(whole / "tokenizer.json"))
    sign(whole)
    tokenizer = Tokenizer(whole)
    assert tokenizer.decode([0, 1]) == "cde"
    for after in ([], [0]):
        with pytest.raises(CheckpointError, match=r"the tokenizer in .* is damaged: .*prefix"):
            list(tokenizer.stream([0, 1][len(after) :], after=after))


def test_settings_of_the_tokenizer_that_shorten_or_pad_do_not(whole: Path) -> None:
    expected = Tokenizer(whole).encode(TEXT)
    path = whole / "tokenizer.json"
    content = json.loads(path.read_text())
    content["truncation"] = {
        **{"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    }
    content["padding"] = {
        "strategy": {"Fixed": 9},
        **{"direction": "Right", "pad_to_multiple_of": None},
        **{"pad_id": 0, "pad_type_id": 0, "pad_token": "<|endoftext|>"},
    }
    path.write_text(json.dumps(content))
    sign(whole)
    assert Tokenizer(whole).encode(TEXT) == expected
    assert len(Tokenizer(whole).encode("a")) == 1


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("{}", "the tokenizer in .* is damaged"),
        ("", "the tokenizer in .* is damaged"),
        ('{"model": {"type": "BPE"}}', "the tokenizer in .* is damaged"),
    ],
)
def test_a_file_that_is_no_tokenizer(whole: Path, content: str, match: str) -> None:
    (whole / "tokenizer.json").write_text(content)
    with pytest.raises(CheckpointError, match="was truncated or altered"):
        Tokenizer(whole)
    sign(whole)
    with pytest.raises(CheckpointError, match=match):
        Tokenizer(whole)


def test_no_tokenizer(save: Save) -> None:
    folder = save().folder
    with pytest.raises(CheckpointError, match=r"lacks the file tokenizer\.json"):
        Tokenizer(folder)


@pytest.mark.parametrize("setting", ["add_bos_token", "add_eos_token", "split_special_tokens"])
def test_settings_that_only_transformers_follows(whole: Path, setting: str) -> None:
    edit(whole, "tokenizer_config.json", **{setting: True})
    with pytest.raises(UnsupportedError, match=f"transformers would change it by {setting}"):
        Tokenizer(whole)
    edit(whole, "tokenizer_config.json", **{setting: False}, clean_up_tokenization_spaces=True)
    assert Tokenizer(whole).encode("fox")  # which transformers ignores for such a tokenizer


def test_the_tokenizer_of_another_model(save: Save, whole: Path) -> None:
    from bkcore.text import list_tokenizer

    folder = save().folder
    (folder / "tokenizer.json").write_bytes((whole / "tokenizer.json").read_bytes())
    list_tokenizer(folder)
    with pytest.raises(CheckpointError, match="it is the tokenizer of another model"):
        load(folder)
