"""The manifest of a checkpoint folder: every file that is loaded from it, with its SHA-256.

A folder holds safetensors and JSON, and `bkcore.json`: the format version and the digests. A model
and its tokenizer are saved one after the other, in either order; each keeps the entries of the
other. What is not listed is not read, and what was cut short or changed is refused by name.
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from safetensors import SafetensorError

from bkcore.errors import CheckpointError
from bkcore.outputs import to_json
from bkcore.reading import JSON_BYTES, open_regular, read_bytes, read_json, shown

FORMAT_VERSION = 4
"""Version 1 was of models that brought to unit mean square what their heads found, version 2 of
models whose embedded tokens entered the residual stream as they are."""

MANIFEST = "bkcore.json"
RECEIPT = "receipt.json"
CONFIG = "config.json"
GENERATION = "generation_config.json"
SAMPLES = "calibration.safetensors"
"""Token ids of the text that the model was trained on, made by the tokenizer beside it."""

TOKENIZER = "tokenizer.json"

TOKENIZER_FILES = (
    *(TOKENIZER, "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "merges.txt", "tokenizer.model"),
)
"""Names of the files that transformers may read a tokenizer from."""

_WEIGHTS = re.compile(r"model(\.[A-Za-z0-9_-]+)?(-\d{5}-of-\d{5})?\.safetensors")
_INDEX = re.compile(r"model\.safetensors\.index(\.[A-Za-z0-9_-]+)?\.json")
_WITHOUT_VARIANT = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
_DIGEST = re.compile(r"[0-9a-f]{64}")

Digests = dict[str, str]
"""SHA-256 in hexadecimal by file name."""


def is_weights_file(name: str) -> bool:
    """Whether a name is one of a file of weights, whole or a shard."""
    return _WEIGHTS.fullmatch(name) is not None


def is_model_file(name: str) -> bool:
    """Whether a name is one of a model's own files, which go when another takes its place."""
    return (
        name in (CONFIG, GENERATION, RECEIPT, SAMPLES)
        or is_weights_file(name)
        or _INDEX.fullmatch(name) is not None
    )


def is_tokenizer_file(name: str) -> bool:
    """Whether a name is one of the files of a tokenizer."""
    return name in TOKENIZER_FILES


# ---- reading -------------------------------------------------------------------------------


def read(folder: Path) -> Digests:
    """What the manifest of a checkpoint folder lists.

    Raises:
        CheckpointError: if there is no such folder or manifest, it lists no model, or the format
            is not the one that this version reads.
    """
    _check_folder(folder)
    try:
        content = read_json(_place(folder, MANIFEST))
        version, digests = content["format_version"], content["sha256"]
        if type(version) is not int:
            raise ValueError(f"its format_version is {shown(version)}, not an integer")
        _check_digests(digests)
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{folder} is not a bkcore checkpoint: it has no {MANIFEST}"
        ) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / MANIFEST} cannot be read: {error}") from error
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"{folder} has checkpoint format {shown(version)}; this bkcore reads {FORMAT_VERSION}. "
            "Install a newer bkcore"
        )
    if version < FORMAT_VERSION:
        raise CheckpointError(
            f"{folder} has checkpoint format {shown(version)}, of a model that this bkcore no "
            f"longer has; it reads {FORMAT_VERSION}, and what these weights would compute now is "
            "not what they were trained for. Train the model again, or load it with the bkcore "
            "that saved it"
        )
    if CONFIG not in digests or not any(map(is_weights_file, digests)):
        raise CheckpointError(
            f"{folder / MANIFEST} does not list a whole model, which has {CONFIG} and weights in "
            "safetensors; save the model again"
        )
    return dict(digests)


def contents(folder: Path, name: str, digests: Digests, limit: int = JSON_BYTES) -> bytes:
    """A small file of a checkpoint folder, checked.

    Raises:
        CheckpointError: if it is not listed, missing, no regular file of the folder, larger than
            `limit`, truncated or altered.
    """
    with _reading(folder, name):
        content = read_bytes(_place(folder, name), limit)
    _compare(folder, name, digests, hashlib.sha256(content).hexdigest())
    return content


def check(folder: Path, name: str, digests: Digests) -> tuple[Path, os.stat_result]:
    """Check a large file of a checkpoint folder, a part at a time; errors as in `contents`.

    Returns:
        Where it is and what was checked there, to find out whether another file came in between.
    """
    with _reading(folder, name):
        path = _place(folder, name)
        with open_regular(path) as file:
            found, status = _sha256(file), os.fstat(file.fileno())
    _compare(folder, name, digests, found)
    return path, status


def verify(folder: Path) -> Digests:
    """Check all of a checkpoint folder against its manifest.

    Returns:
        What it lists.

    Raises:
        CheckpointError: as `read` and `contents`.
    """
    digests = read(folder)
    for name in digests:
        check(folder, name, digests)
    return digests


def model_bytes(folder: Path) -> int:
    """Bytes on disk of what the model loads from, so without receipt, samples and tokenizer."""
    loaded = [name for name in read(folder) if is_model_file(name)]
    names = [name for name in loaded if name not in (RECEIPT, SAMPLES)]
    return sum((folder / name).stat().st_size for name in names)


def _check_folder(folder: Path) -> None:
    try:
        is_file, is_folder = folder.is_file(), folder.is_dir()
    except (OSError, ValueError) as error:  # such as a name that is too long
        raise CheckpointError(f"there is no checkpoint folder {shown(str(folder))}") from error
    if is_file:
        raise CheckpointError(f"{folder} is a file; a checkpoint is a folder")
    if not is_folder:
        raise CheckpointError(
            f"there is no checkpoint folder {folder.absolute()}; one on a hub has to be downloaded "
            "first, with huggingface_hub.snapshot_download()"
        )


def _check_digests(digests: object) -> None:
    if not isinstance(digests, dict):
        raise TypeError(f"its sha256 is {shown(digests)}, not names with digests")
    for name, digest in digests.items():
        if not _is_plain(name):
            raise ValueError(f"it lists {shown(name)}, which is no name of a file in this folder")
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
        raise CheckpointError(f"the checkpoint {folder} lacks its file {name}") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / name} cannot be read: {error}") from error


def _place(folder: Path, name: str) -> Path:
    """Where a file is: in the folder, or where the folders of a hub's cache point to.

    Raises:
        OSError: if it is a link to somewhere else.
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
        if is_tokenizer_file(name):  # saving the model keeps what is listed of it
            remedy = "if it is as it should be, call bkcore.text.list_tokenizer(folder)"
        raise CheckpointError(
            f"{folder / name} was truncated or altered since it was saved "
            f"(its SHA-256 differs); restore it or {remedy}"
        )


def _sha256(file: BinaryIO) -> str:
    digest, left = hashlib.sha256(), os.fstat(file.fileno()).st_size
    while left and (chunk := file.read(min(left, 1 << 20))):
        digest.update(chunk)
        left -= len(chunk)
    return digest.hexdigest()


# ---- writing -------------------------------------------------------------------------------


@contextmanager
def saving_model(folder: Path) -> Iterator[Path]:
    """Yield an empty folder to write a model in; on success its files take the place of the old.

    The manifest lists them, and the tokenizer that is in `folder`. Nothing of a model that was
    saved there before stays, samples of its training text included; files of others do.

    Files are complete on disk before the first is renamed into place, the manifest comes after
    them, and what it no longer lists goes last. So whenever this ends, `folder` holds the old model
    or the new one, or what loading refuses because digests differ.

    Raises:
        CheckpointError: if `folder` is a file or cannot be written, or on any `OSError` or
            `SafetensorError` inside. If that is before the first rename, `folder` is as it was.
    """
    with _staging(folder) as staged:
        yield staged
        own = _digests(staged)
        others = _others(folder, is_model_file)
        _move(
            staged,
            folder,
            own,
            {**own, **_tokenizer_in(folder), **others},
            _earlier_model(folder),
        )


@contextmanager
def saving_tokenizer(folder: Path) -> Iterator[Path]:
    """Yield an empty folder to write a tokenizer in, as `saving_model` does for a model.

    If `folder` has a manifest, it lists the tokenizer afterwards, and no longer the samples that
    another tokenizer made. A manifest of another format stays as it is: nothing but saving the
    model again makes it one of this. What no manifest lists is only overwritten, never deleted.

    Raises:
        CheckpointError: as `saving_model`.
    """
    with _staging(folder) as staged:
        yield staged
        own = _digests(staged)
        version, listed = _any_manifest(folder)
        stale = set(filter(is_tokenizer_file, listed))
        if SAMPLES in listed and listed.get(TOKENIZER) != own.get(TOKENIZER):
            stale.add(SAMPLES)
        digests = None
        if version == FORMAT_VERSION:
            digests = {**own, **_others(folder, stale.__contains__)}
        _move(staged, folder, own, digests, stale)


@contextmanager
def saving_checkpoint(folder: Path) -> Iterator[Path]:
    """Yield an empty folder to save a model, its tokenizer and samples in, as `saving_model` does.

    Raises:
        CheckpointError: as `saving_model`, or if no whole model was saved.
    """
    with _staging(folder) as staged:
        yield staged
        read(staged)
        own = _digests(staged)
        del own[MANIFEST]
        others = _others(folder, lambda name: is_model_file(name) or is_tokenizer_file(name))
        tokenizer = set(filter(is_tokenizer_file, _any_manifest(folder)[1]))
        _move(staged, folder, own, {**own, **others}, _earlier_model(folder) | tokenizer)


def list_tokenizer(folder: Path) -> None:
    """Enter the tokenizer's files that are in a checkpoint folder in its manifest, as they are.

    Raises:
        CheckpointError: if the folder has no manifest, or it cannot be written.
    """
    read(folder)
    with _staging(folder) as staged:
        others = _others(folder, is_tokenizer_file)
        _move(staged, folder, {}, {**_tokenizer_in(folder), **others}, set())


@contextmanager
def _staging(folder: Path) -> Iterator[Path]:
    try:
        is_new = not folder.exists()
        if not is_new and not folder.is_dir():
            raise CheckpointError(f"{folder} is a file; name a folder for the checkpoint")
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:  # ValueError: a name that no system takes
        raise CheckpointError(
            f"cannot write a checkpoint to {shown(str(folder))}: {error}"
        ) from error
    try:
        with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder) as name:
            yield Path(name)
    except BaseException as error:
        if is_new:
            with suppress(OSError):  # it was never made
                folder.rmdir()
        if isinstance(error, OSError | SafetensorError):
            raise CheckpointError(f"cannot write a checkpoint to {folder}: {error}") from error
        raise


def _any_manifest(folder: Path) -> tuple[object, Digests]:
    """Format and entries of a manifest of any format; no format if none can be read."""
    try:
        content = read_json(folder / MANIFEST)
        version, digests = content["format_version"], content["sha256"]
        _check_digests(digests)
    except (OSError, ValueError, KeyError, TypeError):
        return None, {}
    return version, dict(digests)


def _others(folder: Path, owns: Callable[[str], bool]) -> Digests:
    """What the manifest lists of others, as far as it is there."""
    _, listed = _any_manifest(folder)
    return {name: x for name, x in listed.items() if not owns(name) and (folder / name).is_file()}


def _earlier_model(folder: Path) -> set[str]:
    """Files of a model that was saved there: the listed ones, and what may be taken for it."""
    listed = set(filter(is_model_file, _any_manifest(folder)[1]))
    return listed | set(filter(_WITHOUT_VARIANT.fullmatch, os.listdir(folder)))


def _tokenizer_in(folder: Path) -> Digests:
    """Digests of the tokenizer's files in a folder; none if it has but files of such names."""
    if not _is_own(folder / TOKENIZER):
        return {}
    names = [name for name in TOKENIZER_FILES if _is_own(folder / name)]
    return {name: _digest(folder / name) for name in names}


def _is_own(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()


def _digests(staged: Path) -> Digests:
    return {path.name: _digest(path) for path in staged.iterdir()}


def _digest(path: Path) -> str:
    with open_regular(path) as file:
        return _sha256(file)


def _move(
    staged: Path, folder: Path, own: Digests, digests: Digests | None, stale: set[str]
) -> None:
    """Move what was written into a folder, with a manifest if there are digests for one."""
    names = sorted(own)
    manifest = {"format_version": FORMAT_VERSION, "sha256": dict(sorted((digests or {}).items()))}
    (staged / MANIFEST).write_text(to_json(manifest), encoding="utf-8")
    for name in names:  # safetensors makes files that nobody but their owner can read
        (staged / name).chmod((staged / MANIFEST).stat().st_mode)
    for name in names if digests is None else [*names, MANIFEST]:
        os.replace(staged / name, folder / name)
    for name in stale - own.keys():
        if (folder / name).is_file() or (folder / name).is_symlink():
            (folder / name).unlink()
