"""Token ids on disk: what was written comes back, from the disk, or not at all."""

import errno
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from bkcore.errors import CheckpointError, DataError, InputError
from bkcore.text import (
    TokenShards,
    cached_tokenizer,
    cached_tokens,
    encode,
    open_corpus,
    tokenizer_hash,
    train_tokenizer,
    write_shards,
)
from bkcore.text import cache as cache_module


def write(folder: Path, *pieces: Tensor, vocab_size: int = 1000, **options: Any) -> TokenShards:
    return write_shards(
        folder, pieces, vocab_size=vocab_size, tokenizer_hash="t", text_hash="x", **options
    )


@given(sizes=st.lists(st.integers(0, 4), max_size=5), shard=st.integers(1, 6))
def test_slices_are_those_of_the_tensor(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], shard: int
) -> None:
    tokens = torch.arange(sum(sizes)) * 7 % 1000
    shards = write(
        tmp_path_factory.mktemp("shards") / "tokens", *tokens.split(sizes), shard_tokens=shard
    )
    assert len(shards) == len(tokens)
    assert len(shards.arrays) == -(-len(tokens) // shard)
    ends = range(-len(tokens) - 1, len(tokens) + 2)
    for start in ends:
        for stop in ends:
            assert torch.equal(shards[start:stop], tokens[start:stop])
    assert shards[:].dtype == torch.int64


@pytest.mark.parametrize(("vocab", "dtype"), [(1 << 16, "uint16"), ((1 << 16) + 1, "uint32")])
def test_the_smallest_dtype_that_holds_the_vocabulary(
    tmp_path: Path, vocab: int, dtype: str
) -> None:
    tokens = torch.tensor([0, vocab - 1])
    shards = write(tmp_path / "tokens", tokens, vocab_size=vocab)
    assert torch.equal(shards[:], tokens)
    assert all(type(array) is np.memmap and array.dtype == dtype for array in shards.arrays)
    index = json.loads((tmp_path / "tokens" / "index.json").read_text())
    assert (index["dtype"], index["tokens"], index["tokenizer_hash"]) == (dtype, 2, "t")


def test_ids_outside_of_the_vocabulary(tmp_path: Path) -> None:
    for bad in (-1, 1000):
        with pytest.raises(InputError, match="but the vocabulary has 1000"):
            write(tmp_path / "tokens", torch.tensor([5, bad]))
    assert not (tmp_path / "tokens").exists()


def test_an_interrupted_write_leaves_nothing_that_can_be_opened(tmp_path: Path) -> None:
    def pieces() -> Iterator[Tensor]:
        yield torch.arange(10)
        raise KeyboardInterrupt

    folder = tmp_path / "tokens"
    with pytest.raises(KeyboardInterrupt):
        write_shards(
            folder, pieces(), vocab_size=10, tokenizer_hash="", text_hash="", shard_tokens=4
        )
    assert not folder.exists()
    assert torch.equal(write(folder, torch.arange(10))[:], torch.arange(10))
    assert list(tmp_path.iterdir()) == [folder]


def test_damage_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "tokens"
    with pytest.raises(DataError, match="holds no token ids"):
        TokenShards(folder)
    write(folder, torch.arange(10), shard_tokens=4)
    second = folder / "00001.npy"
    content = second.read_bytes()
    second.write_bytes(content[:-1])
    with pytest.raises(DataError, match=r"00001\.npy are missing or damaged"):
        TokenShards(folder)
    np.save(second, np.arange(3, dtype=np.uint16))
    with pytest.raises(DataError, match=r"uint16 of shape \(3,\), but uint16 of shape \(4,\)"):
        TokenShards(folder)
    second.unlink()
    with pytest.raises(DataError, match=r"00001\.npy are missing"):
        TokenShards(folder)
    (folder / "index.json").write_text('{"format_version": 2}')
    with pytest.raises(DataError, match="format 2, but this bkcore reads up to 1"):
        TokenShards(folder)


def test_only_plain_slices(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="step 1, not 2"):
        write(tmp_path / "tokens", torch.arange(4))[::2]
    with pytest.raises(InputError, match="exists"):
        write(tmp_path / "tokens", torch.arange(4))


def test_a_corpus_is_encoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = "".join(f"site {number} of {number * number % 97}\n" for number in range(3000))
    text = tmp_path / "text"
    text.mkdir()
    (text / "all.txt").write_text(lines)
    corpus, cache = open_corpus(text), tmp_path / "cache"
    tokenizer = cached_tokenizer(corpus, 300, cache)
    tokens = cached_tokens(corpus, tokenizer, cache)
    assert torch.equal(tokens[:], encode(tokenizer, "".join(corpus.train())))
    assert tokens.index["text_sha256"] == corpus.sha256
    assert all(type(array) is np.memmap for array in tokens.arrays)

    with monkeypatch.context() as patch:
        for name in ("train_tokenizer", "encode_pieces"):
            patch.setattr(cache_module, name, None)  # a second call would fail
        again = cached_tokenizer(corpus, 300, cache)
        assert tokenizer_hash(again) == tokenizer_hash(tokenizer)
        assert torch.equal(cached_tokens(corpus, again, cache)[:], tokens[:])

    # Another text, or another tokenizer, has token ids of its own.
    (text / "all.txt").write_text(lines.replace("site 7 ", "side 7 "))
    other = open_corpus(text)
    renewed = cached_tokens(other, tokenizer, cache)
    assert renewed.index["text_sha256"] == other.sha256 != corpus.sha256
    larger = cached_tokenizer(corpus, 310, cache)
    renewed = cached_tokens(corpus, larger, cache)
    assert renewed.index["tokenizer_hash"] == tokenizer_hash(larger) != tokenizer_hash(tokenizer)
    assert tokenizer_hash(cached_tokenizer(other, 300, cache)) == tokenizer_hash(
        train_tokenizer("".join(other.train()), 300)
    )


def test_a_full_disk_is_said_in_words_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library that writes a tokenizer raises a bare `Exception`."""
    text, cache = tmp_path / "text", tmp_path / "cache"
    text.mkdir()
    (text / "all.txt").write_text("".join(f"site {n} of {n * n % 97}\n" for n in range(3000)))
    corpus = open_corpus(text)

    def half(_: PreTrainedTokenizerFast, folder: str, **options: Any) -> None:
        (Path(folder) / "tokenizer.json").write_text("{")
        raise Exception("No space left on device (os error 28)")

    with monkeypatch.context() as patch:
        patch.setattr(PreTrainedTokenizerFast, "save_pretrained", half)
        with pytest.raises(CheckpointError, match=r"cannot write.*No space left"):
            cached_tokenizer(corpus, 300, cache)
        assert list(cache.iterdir()) == []
    tokenizer = cached_tokenizer(corpus, 300, cache)
    with monkeypatch.context() as patch:
        patch.setattr(PreTrainedTokenizerFast, "save_pretrained", half)
        with pytest.raises(CheckpointError, match="No space left"):
            tokenizer.save_pretrained(cache)
        full = OSError(errno.ENOSPC, "No space left on device")
        patch.setattr(np, "save", lambda *_: (_ for _ in ()).throw(full))
        with pytest.raises(DataError, match="No space left"):
            cached_tokens(corpus, tokenizer, cache)
        assert [path.name[:9] for path in cache.iterdir()] == ["tokenizer"]
    assert len(cached_tokens(corpus, tokenizer, cache)) > 0
