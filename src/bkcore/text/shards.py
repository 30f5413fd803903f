"""Token ids on disk, mapped into memory: the text may be larger than memory.

A folder holds `index.json` and arrays in NumPy's format: `uint16` if the vocabulary fits, else
`uint32`. It appears complete or not at all.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bkcore.errors import DataError, InputError
from bkcore.outputs import to_json
from bkcore.reading import open_regular, read_json

FORMAT_VERSION = 1
SHARD_TOKENS = 1 << 26
"""Tokens of a full shard: 128 MiB in uint16."""

_INDEX = "index.json"


class TokenShards:
    """A sequence of token ids in files; only the slices that are used are read.

    Slices with step 1, as in ``shards[10:20]``, return int64 tensors of shape (tokens,); nothing
    else stays in memory. `len` is the number of tokens.

    Args:
        folder: written by `write_shards`.

    Raises:
        DataError: if the folder is missing, incomplete, damaged, or of a newer format.
    """

    def __init__(self, folder: Path) -> None:
        self.index = _read_index(folder)
        self.arrays = [_open(folder, shard, self.index["dtype"]) for shard in self.index["shards"]]
        self._starts = np.cumsum([0, *(len(array) for array in self.arrays)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, key: slice) -> Tensor:
        start, stop, step = key.indices(len(self))
        if step != 1:
            raise InputError(f"TokenShards takes slices with step 1, not {step}")
        parts = []
        shard = int(np.searchsorted(self._starts, start, side="right")) - 1
        while start < stop:
            first = int(self._starts[shard])
            part = self.arrays[shard][start - first : stop - first]
            parts.append(part.astype(np.int64))
            start += len(part)
            shard += 1
        return torch.from_numpy(np.concatenate([np.empty(0, np.int64), *parts]))


def write_shards(
    folder: Path,
    pieces: Iterable[Tensor],
    *,
    vocab_size: int,
    tokenizer_hash: str,
    text_hash: str,
    shard_tokens: int = SHARD_TOKENS,
) -> TokenShards:
    """Write token ids to a new folder, with at most one shard of them in memory.

    Args:
        folder: the folder, which must not exist. A folder beside it holds the files until they are
            complete.
        pieces: integer token ids of shape (tokens,) each, in the order of the text.
        vocab_size: the ids lie in [0, vocab_size), at most 2^32.
        tokenizer_hash: see `bkcore.text.tokenizer_hash`; the index keeps it.
        text_hash: SHA-256 of the text; the index keeps it.
        shard_tokens: tokens of a full shard, at least 1.

    Raises:
        InputError: if an id is outside the vocabulary, or the folder exists.
        DataError: if the folder cannot be written.
    """
    if folder.exists():
        raise InputError(f"{folder} already exists; token shards need a new folder")
    staged = folder.with_name(f".{folder.name}.saving")
    dtype: Any = np.uint16 if vocab_size <= 1 << 16 else np.uint32
    try:
        shutil.rmtree(staged, ignore_errors=True)
        staged.mkdir(parents=True)
        shards: list[dict[str, Any]] = []
        for number, array in enumerate(_in_shards(pieces, vocab_size, dtype, shard_tokens)):
            name = f"{number:05}.npy"
            np.save(staged / name, array)
            shards.append({"file": name, "tokens": len(array)})
        index = {
            "format_version": FORMAT_VERSION,
            "dtype": np.dtype(dtype).name,
            "tokens": sum(shard["tokens"] for shard in shards),
            "vocab_size": vocab_size,
            "tokenizer_hash": tokenizer_hash,
            "text_sha256": text_hash,
            "shards": shards,
        }
        (staged / _INDEX).write_text(to_json(index), encoding="utf-8")
        os.replace(staged, folder)
    except BaseException as error:
        shutil.rmtree(staged, ignore_errors=True)
        if isinstance(error, OSError):
            raise DataError(
                f"cannot write token ids to {folder} ({error.strerror or error})"
            ) from error
        raise
    return TokenShards(folder)


def _in_shards(
    pieces: Iterable[Tensor], vocab_size: int, dtype: Any, shard_tokens: int
) -> Iterable[NDArray[Any]]:
    shard, filled = np.empty(shard_tokens, dtype), 0
    for piece in pieces:
        if len(piece) and not 0 <= int(piece.min()) <= int(piece.max()) < vocab_size:
            raise InputError(
                f"the token ids go from {int(piece.min())} to {int(piece.max())}, but the "
                f"vocabulary has {vocab_size} tokens; encode the text with its tokenizer"
            )
        ids = piece.numpy()
        while len(ids):
            taken = ids[: shard_tokens - filled]
            shard[filled : filled + len(taken)] = taken
            filled += len(taken)
            ids = ids[len(taken) :]
            if filled == shard_tokens:
                yield shard
                filled = 0
    if filled:
        yield shard[:filled]


def _read_index(folder: Path) -> dict[str, Any]:
    try:
        index = read_json(folder / _INDEX)
        version = index["format_version"]
        if type(version) is not int:
            raise TypeError("its format_version is not an integer")
        if version <= FORMAT_VERSION and not _is_whole(index):
            raise ValueError("it does not name the files")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{folder} holds no token ids: {_INDEX} cannot be read ({error})"
        ) from error
    if version > FORMAT_VERSION:
        raise DataError(
            f"the token ids in {folder} have format {version}, but this bkcore reads up to "
            f"{FORMAT_VERSION}; install a newer bkcore"
        )
    return index


def _is_whole(index: dict[str, Any]) -> bool:
    """Whether an index has what `_open` needs, with files in its own folder."""
    return isinstance(index["dtype"], str) and all(
        isinstance(shard["file"], str)
        and Path(shard["file"]).name == shard["file"]
        and type(shard["tokens"]) is int
        for shard in index["shards"]
    )


def _open(folder: Path, shard: dict[str, Any], dtype: str) -> NDArray[Any]:
    path = folder / shard["file"]
    try:
        open_regular(path).close()  # refuses a pipe, which would block
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(
            f"the token ids in {path} are missing or damaged; remove {folder}"
        ) from error
    if array.dtype.name != dtype or array.shape != (shard["tokens"],):
        raise DataError(
            f"{path} holds {array.dtype.name} of shape {array.shape}, but {dtype} of shape "
            f"({shard['tokens']},) was written; remove {folder}"
        )
    return array
