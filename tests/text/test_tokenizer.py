"""The tokenizer: lossless, repeatable, quiet; encoding in pieces equals encoding in one."""

import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from bkcore.errors import InputError
from bkcore.text import (
    END_OF_TEXT,
    encode,
    encode_pieces,
    tokenizer,
    tokenizer_hash,
    train_tokenizer,
)

TEXT = "The resolvent of a chain, said the chain's owner, isn't what it was in 1961.\n\n \n" * 40
BLANKS = st.text(alphabet=" \n\t\r\x0b\x1c\x85\xa0\u2003\u200b\u3000abz'.1é世", max_size=300)

TRAIN_AND_HASH = """
from bkcore.text import tokenizer_hash, train_tokenizer
text = " ".join(f"word{i % 97} {i * i % 1013}" for i in range(4000))
print(tokenizer_hash(train_tokenizer(text, 700)))
"""

# What is repeated to long texts in which blanks and line feeds are rare, missing or all there is.
LONG = {
    "Chinese": "世界上的每一条河流都有它自己的名字",
    "Chinese in lines": "世界上的每一条河流，都有它自己的名字。\n" * 7,
    "Thai": "แม่น้ำทุกสายมีชื่อของมันเอง",
    "Hebrew": "לכלנהריששםמשלו",
    "Hindi": "हर नदी का अपना नाम होता है".replace(" ", ""),
    "emoji": "😀👩‍👩‍👧🇨🇦",
    "combining marks": "\u0301\u0323",
    "one letter": "a",
    "two letters": "ab",
    "apostrophes": "'",
    "contractions": "'s'll've'",
    "spaces": " ",
    "line feeds": "\n",
    "carriage returns": "line\r",
    "Windows": "\r\n",
    "other blanks": "a\x85b\u2028c\u2029d\xa0e\u3000",
    "no-break spaces": "\xa0",
    "digits": "0123456789",
    "rules": "=",
    "base64": "c29tZS9ieXRlcys=",
}


def without_limit(trained: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The same merges after GPT-2's own pattern, as in checkpoints of before."""
    backend = Tokenizer.from_str(trained.backend_tokenizer.to_str())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=backend)


@pytest.fixture(scope="module")
def small() -> PreTrainedTokenizerFast:
    return train_tokenizer(TEXT, 320)


@given(st.text(max_size=200) | BLANKS)
def test_any_text_comes_back(small: PreTrainedTokenizerFast, text: str) -> None:
    assert small.decode(encode(small, text)) == text


@given(BLANKS)
def test_cuts_do_not_show(small: PreTrainedTokenizerFast, text: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer, "_CHUNK_CHARACTERS", 1)
        ids = encode(small, text).tolist()
    assert ids == small.backend_tokenizer.encode(text, add_special_tokens=False).ids


@given(BLANKS)
def test_cuts_split_no_word(small: PreTrainedTokenizerFast, text: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer, "_CHUNK_CHARACTERS", 1)
        chunks = list(tokenizer._chunks([text], small.backend_tokenizer.pre_tokenizer))
    assert "".join(chunks) == text
    split = small.backend_tokenizer.pre_tokenizer.pre_tokenize_str
    assert [word for chunk in chunks for word, _ in split(chunk)] == [
        word for word, _ in split(text)
    ]


@given(
    pieces=st.lists(BLANKS | st.text(alphabet="ab \n", max_size=8), max_size=12),
    chunk=st.integers(1, 6),
    at_once=st.integers(1, 3),
)
def test_pieces_do_not_show(
    small: PreTrainedTokenizerFast, pieces: list[str], chunk: int, at_once: int
) -> None:
    text = "".join(pieces)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer, "_CHUNK_CHARACTERS", chunk)
        patch.setattr(tokenizer, "_CHUNKS_AT_ONCE", at_once)
        words = small.backend_tokenizer.pre_tokenizer
        assert list(tokenizer._chunks(pieces, words)) == list(tokenizer._chunks([text], words))
        parts = list(encode_pieces(small, pieces))
    assert all(len(part) for part in parts)
    joined = [token for part in parts for token in part.tolist()]
    assert joined == small.backend_tokenizer.encode(text, add_special_tokens=False).ids


def test_training_on_pieces_is_training_on_the_text() -> None:
    pieces = [TEXT[start : start + 7] for start in range(0, len(TEXT), 7)]
    whole = train_tokenizer(TEXT, 320)
    assert tokenizer_hash(train_tokenizer(iter(pieces), 320)) == tokenizer_hash(whole)


def test_a_lone_surrogate_is_counted_through_the_pieces(small: PreTrainedTokenizerFast) -> None:
    with pytest.raises(InputError, match="lone surrogate at character 5"):
        list(encode_pieces(small, ["abc", "de\ud800"]))


def test_cuts_do_not_show_in_a_long_text(small: PreTrainedTokenizerFast) -> None:
    text = TEXT * 30
    assert len(text) > 2 * tokenizer._CHUNK_CHARACTERS
    assert encode(small, text).tolist() == small(text, verbose=False)["input_ids"]


@pytest.mark.parametrize("kind", LONG)
def test_chunks_are_bounded_in_every_script(small: PreTrainedTokenizerFast, kind: str) -> None:
    text = LONG[kind] * (70_000 // len(LONG[kind]))
    for trained in (small, without_limit(small)):
        chunks = list(tokenizer._chunks([text], trained.backend_tokenizer.pre_tokenizer))
        assert max(map(len, chunks)) <= 1 << 14
        assert len(chunks) <= len(text) >> 12
        assert "".join(chunks) == text
        assert trained.decode(encode(trained, text)) == text
    whole = small.backend_tokenizer.encode(text, add_special_tokens=False).ids
    assert encode(small, text).tolist() == whole


def test_no_cut_shows_in_latin_1_bytes(small: PreTrainedTokenizerFast) -> None:
    text = random.Random(1).randbytes(50_000).decode("latin-1")
    for trained in (small, without_limit(small)):
        ids = encode(trained, text)
        assert ids.tolist() == trained.backend_tokenizer.encode(text).ids
        assert trained.decode(ids) == text


@given(st.text(alphabet=" \n\r\x85\xa0\u2028azlrevsd'.1é世😀\u0e31\u0301ש", max_size=120))
@example("111  \r11")  # of two blanks before a visible character the last is a word of its own
@settings(max_examples=300)
def test_the_tightest_limits_do_not_show(text: str) -> None:
    """With words of up to six characters and chunks of up to eight."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer, "_WORD", tokenizer._WORD.replace("256", "5"))
        patch.setattr(tokenizer, "_CHUNK_CHARACTERS", 3)
        patch.setattr(tokenizer, "_LONGEST_CHUNK", 8)
        patch.setattr(tokenizer, "_CHUNKS_AT_ONCE", 2)
        trained = train_tokenizer("", 257)
        backend = trained.backend_tokenizer
        chunks = list(tokenizer._chunks([text], backend.pre_tokenizer))
    assert all(len(chunk) <= 8 for chunk in chunks)
    split = backend.pre_tokenizer.pre_tokenize_str
    assert [word for chunk in chunks for word, _ in split(chunk)] == [
        word for word, _ in split(text)
    ]
    assert all(end - start <= 6 for _, (start, end) in split(text))


@pytest.mark.parametrize("kind", LONG)
def test_words_are_bounded_where_they_are_counted(kind: str) -> None:
    trained = train_tokenizer(LONG[kind] * (20_000 // len(LONG[kind])), 300)
    words = trained.backend_tokenizer.pre_tokenizer.pre_tokenize_str(LONG[kind] * 1000)
    assert max(end - start for _, (start, end) in words) <= 257


def test_ordinary_words_know_no_limit(wikitext_dir: Path) -> None:
    text = (wikitext_dir / "valid.txt").read_text(encoding="utf-8")[:200_000]
    trained = train_tokenizer(text, 1024)
    plain = Tokenizer(models.BPE())
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        min_frequency=2,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    plain.train_from_iterator([text], trainer=trainer)
    assert plain.get_vocab() == trained.get_vocab()
    assert encode(trained, text).tolist() == plain.encode(text).ids


def test_a_text_without_any_blank_is_one_piece(small: PreTrainedTokenizerFast) -> None:
    text = "x" * 50_000
    assert small.decode(encode(small, text)) == text


def test_ids_are_a_flat_int64_tensor_in_range(small: PreTrainedTokenizerFast) -> None:
    ids = encode(small, TEXT)
    assert ids.dtype == torch.int64
    assert ids.ndim == 1
    assert int(ids.min()) > 0
    assert int(ids.max()) < len(small) <= 320
    assert len(ids) < len(TEXT.encode()) / 2
    assert encode(small, "").shape == (0,)
    assert encode(small, "").dtype == torch.int64


def test_the_special_token_begins_and_ends_a_text(small: PreTrainedTokenizerFast) -> None:
    assert small.bos_token == small.eos_token == END_OF_TEXT
    assert small.bos_token_id == small.eos_token_id == 0
    assert small(END_OF_TEXT)["input_ids"] == [0]


def test_a_literal_special_token_is_text(small: PreTrainedTokenizerFast) -> None:
    ids = encode(small, f"a{END_OF_TEXT}b")
    assert 0 not in ids
    assert small.decode(ids, skip_special_tokens=True) == f"a{END_OF_TEXT}b"


def test_padding_and_truncation_of_earlier_calls_change_nothing() -> None:
    trained = train_tokenizer(TEXT, 300)
    before, name = encode(trained, TEXT), tokenizer_hash(trained)
    trained.pad_token = END_OF_TEXT
    trained(["a", "b c d"], padding=True, truncation=True, max_length=3)
    assert torch.equal(encode(trained, TEXT), before)
    assert tokenizer_hash(trained) == name


def test_saving_and_loading_keeps_the_hash(small: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    small.save_pretrained(tmp_path)
    loaded: Any = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer_hash(loaded) == tokenizer_hash(small)
    assert torch.equal(encode(loaded, TEXT), encode(small, TEXT))
    assert loaded.decode(encode(loaded, "a . b , c ' s\n")) == "a . b , c ' s\n"


def test_training_is_repeatable_and_quiet(capfd: pytest.CaptureFixture[str]) -> None:
    other = subprocess.run(
        [sys.executable, "-c", TRAIN_AND_HASH], capture_output=True, text=True, check=True
    )
    assert len(other.stdout.strip()) == 16
    assert other.stderr == ""
    exec(TRAIN_AND_HASH, {})
    assert capfd.readouterr() == (other.stdout, "")


def test_another_text_or_size_has_another_hash(small: PreTrainedTokenizerFast) -> None:
    names = {
        tokenizer_hash(train_tokenizer(text, size))
        for text in (TEXT, "ab " * 99)
        for size in (258, 300)
    }
    assert len(names - {tokenizer_hash(small)}) >= 3


def test_a_short_text_runs_out_of_pairs() -> None:
    assert len(train_tokenizer("", 1000)) == 257
    assert len(train_tokenizer("abab", 1000)) < 270


@pytest.mark.parametrize("size", [-1, 0, 256])
def test_too_small_a_vocabulary(size: int) -> None:
    with pytest.raises(InputError, match=f"vocab_size must be at least 257, .* not {size}"):
        train_tokenizer(TEXT, size)


def test_an_impossible_frequency() -> None:
    with pytest.raises(InputError, match="min_frequency must be at least 1, not 0"):
        train_tokenizer(TEXT, 300, min_frequency=0)


def test_a_lone_surrogate_is_no_text(small: PreTrainedTokenizerFast) -> None:
    with pytest.raises(InputError, match="lone surrogate at character 2"):
        encode(small, "ab\ud800")
    with pytest.raises(InputError, match="lone surrogate at character 0"):
        train_tokenizer("\udfff", 300)


def test_wikitext_comes_back(wikitext_dir: Path) -> None:
    text = (wikitext_dir / "valid.txt").read_text(encoding="utf-8")[:300_000]
    trained = train_tokenizer(text, 1024)
    ids = encode(trained, text)
    assert trained.decode(ids) == text
    assert ids.tolist() == trained.backend_tokenizer.encode(text, add_special_tokens=False).ids


def test_a_tokenizer_without_words_takes_long_texts() -> None:
    """As some tokenizers of other models, which merge across blanks."""
    tokenizer = train_tokenizer("a few words " * 20, 300)
    tokenizer.backend_tokenizer.pre_tokenizer = None
    assert len(encode(tokenizer, "abcdefgh" * 5000)) > 0
