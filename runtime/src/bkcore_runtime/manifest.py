"""The manifest of a checkpoint folder: every file that is loaded from it, with its SHA-256.

A folder holds safetensors and JSON files, and `bkcore.json` with the format version and the
digests. Files that are not listed are never read. A truncated or altered file is refused by name.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from bkcore_runtime.errors import CheckpointError
from bkcore_runtime.reading import JSON_BYTES, open_regular, read_bytes, read_json, shown

FORMAT_VERSION = 4
"""In version 1, models normalized what their heads found to unit mean square. In version 2,
embedded tokens entered the residual stream unscaled."""

MANIFEST = "bkcore.json"
CONFIG = "config.json"
GENERATION = "generation_config.json"
TOKENIZER = "tokenizer.json"
TOKENIZER_FILES = (
    *(TOKENIZER, "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "merges.txt", "tokenizer.model"),
)
"""Names of the files that transformers may read a tokenizer from."""

_WEIGHTS = re.compile(r"model(\.[A-Za-z0-9_-]+)?(-\d{5}-of-\d{5})?\.safetensors")
_HUGE_PAGE = 2**21
_MADV_POPULATE_READ = 22  # mmap of Python 3.13 and older lacks it

_DIGEST = re.compile(r"[0-9a-f]{64}")

Digests = dict[str, str]
"""SHA-256 digests in hexadecimal, by file name."""


def is_weights_file(name: str) -> bool:
    """Whether a name is that of a weights file, complete or a shard."""
    return _WEIGHTS.fullmatch(name) is not None


def is_tokenizer_file(name: str) -> bool:
    """Whether a name is that of a tokenizer file."""
    return name in TOKENIZER_FILES


def read(folder: Path) -> Digests:
    """Read the file names and digests in a checkpoint folder's manifest.

    Raises:
        CheckpointError: if the folder or its manifest is missing, the manifest lists no model, or
            its format is not the one that this version reads.
    """
    _check_folder(folder)
    try:
        content = read_json(_place(folder, MANIFEST))
        version, digests = content["format_version"], content["sha256"]
        if type(version) is not int:
            raise ValueError(f"its format_version is {shown(version)}, not an integer")
        check_digests(digests)
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{folder} is not a bkcore checkpoint; it has no {MANIFEST}"
        ) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / MANIFEST} cannot be read: {error}") from error
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"{folder} has checkpoint format {shown(version)}, but this bkcore reads format "
            f"{FORMAT_VERSION}; install a newer bkcore"
        )
    if version < FORMAT_VERSION:
        raise CheckpointError(
            f"{folder} has the old checkpoint format {shown(version)}, but this bkcore reads "
            f"{FORMAT_VERSION}; the model has changed since, and would not compute what these "
            "weights were trained for; train it again, or load it with the bkcore that saved it"
        )
    if CONFIG not in digests or not any(map(is_weights_file, digests)):
        raise CheckpointError(
            f"{folder / MANIFEST} does not list a complete model, which needs {CONFIG} and weights "
            "in safetensors; save the model again"
        )
    return dict(digests)


def contents(folder: Path, name: str, digests: Digests, limit: int = JSON_BYTES) -> bytes:
    """Read a small file of a checkpoint folder, and check it against its digest.

    Raises:
        CheckpointError: if the file is not listed, missing, not a regular file in the folder,
            larger than `limit`, truncated or altered.
    """
    with _reading(folder, name):
        content = read_bytes(_place(folder, name), limit)
    _compare(folder, name, digests, hashlib.sha256(content).hexdigest())
    return content


def check(folder: Path, name: str, digests: Digests) -> tuple[Path, os.stat_result]:
    """Check a large file of a checkpoint folder piece by piece; raises errors as `contents`.

    Returns:
        The file's path, and its status when it was checked, to notice a later replacement.
    """
    with _reading(folder, name):
        path = _place(folder, name)
        with open_regular(path) as file:
            status = os.fstat(file.fileno())  # before, to notice what changes meanwhile
            found = sha256(file)
    _compare(folder, name, digests, found)
    return path, status


def _check_folder(folder: Path) -> None:
    try:
        is_file, is_folder = folder.is_file(), folder.is_dir()
    except (OSError, ValueError) as error:  # such as a name that is too long
        raise CheckpointError(f"there is no checkpoint folder {shown(str(folder))}") from error
    if is_file:
        raise CheckpointError(f"{folder} is a file; a checkpoint is a folder")
    if not is_folder:
        raise CheckpointError(
            f"there is no checkpoint folder {folder.absolute()}; check the path and the current "
            "folder, or, if the model is on a hub, download it with "
            "huggingface_hub.snapshot_download()"
        )


def check_digests(digests: object) -> None:
    """Raise `TypeError` or `ValueError` unless these are digests by plain file names."""
    if not isinstance(digests, dict):
        raise TypeError(f"its sha256 is {shown(digests)}, not a mapping from names to digests")
    for name, digest in digests.items():
        if not _is_plain(name):
            raise ValueError(f"it lists {shown(name)}, which cannot name a file in this folder")
        if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
            raise ValueError(f"the digest of {name} is {shown(digest)}, not 64 hexadecimal digits")


def _is_plain(name: str) -> bool:
    """Whether a name stays in its folder."""
    if name in ("", ".", "..", MANIFEST) or len(name.encode(errors="replace")) > 255:
        return False
    return name.isprintable() and not set(name) & set("/\\:")


@contextmanager
def _reading(folder: Path, name: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise CheckpointError(f"the checkpoint {folder} lacks the file {name}") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / name} cannot be read: {error}") from error


def _place(folder: Path, name: str) -> Path:
    """The resolved path of a file: in the folder, or in the blobs of a hub cache it is part of.

    Raises:
        OSError: if the file is a link to anywhere else.
    """
    path = Path(os.path.realpath(folder / name, strict=True))
    home = folder.resolve()
    stores = [each.parent / "blobs" for each in home.parents if each.name == "snapshots"]
    if not any(path.is_relative_to(place) for place in (home, *stores)):
        raise OSError(f"it is a link to {path}, outside the folder")
    return path


def _compare(folder: Path, name: str, digests: Digests, found: str) -> None:
    if name not in digests:
        raise CheckpointError(f"{folder / MANIFEST} does not list {name}")
    if digests[name] != found:
        remedy = "save the model again"
        if is_tokenizer_file(name):  # saving the model would keep the old entry
            remedy = "if the file is right, call bkcore.text.list_tokenizer(folder)"
        raise CheckpointError(
            f"{folder / name} was truncated or altered after it was saved "
            f"(its SHA-256 differs); restore it or {remedy}"
        )


def sha256(file: BinaryIO) -> str:
    """The SHA-256 of a file, in hexadecimal; piece by piece, so that it can be interrupted."""
    left = os.fstat(file.fileno()).st_size  # a file in /proc may go on without end
    _fill_huge_pages(file, left)
    digest = hashlib.sha256()
    while piece := file.read(min(_HUGE_PAGE, left)):
        digest.update(piece)
        left -= len(piece)
    return digest.hexdigest()


def _fill_huge_pages(file: BinaryIO, size: int) -> None:
    """Have a file of some size read into memory in huge pages, if the system has them.

    Memory keeps a file in pages of the size that it was first read in. The engine, which maps the
    file, takes less time to find its weights in huge ones.
    """
    if size < _HUGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return
    # Advice, which may be refused. Unlike a look at a page, it survives if the file is shortened.
    with (
        suppress(OSError, ValueError),
        mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ) as content,
    ):
        content.madvise(mmap.MADV_HUGEPAGE)
        for start in range(0, size, _HUGE_PAGE):
            content.madvise(_MADV_POPULATE_READ, start, min(_HUGE_PAGE, size - start))


def is_same(path: Path, before: os.stat_result) -> bool:
    """Whether a file is still there, and the one that `check` saw."""
    try:
        now = path.stat()
    except OSError:
        return False
    fields = ("st_dev", "st_ino", "st_size", "st_mtime_ns")
    return all(getattr(now, name) == getattr(before, name) for name in fields)
