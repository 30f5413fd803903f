"""The manifest of a checkpoint folder: every file that is loaded from it, with its SHA-256.

A folder holds safetensors and JSON files, and `bkcore.json` with the format version and the
digests. A model and its tokenizer are saved separately, in either order, and each keeps the other's
entries. Files that are not listed are never read. A truncated or altered file is refused by name.
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
"""In version 1, models normalized what their heads found to unit mean square. In version 2,
embedded tokens entered the residual stream unscaled."""

MANIFEST = "bkcore.json"
RECEIPT = "receipt.json"
CONFIG = "config.json"
GENERATION = "generation_config.json"
SAMPLES = "calibration.safetensors"
"""Token ids from the training text, encoded by the tokenizer in the same folder."""

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
"""SHA-256 digests in hexadecimal, by file name."""


def is_weights_file(name: str) -> bool:
    """Whether a name is that of a weights file, complete or a shard."""
    return _WEIGHTS.fullmatch(name) is not None


def is_model_file(name: str) -> bool:
    """Whether a name is that of a model's own file, deleted when another model replaces it."""
    return (
        name in (CONFIG, GENERATION, RECEIPT, SAMPLES)
        or is_weights_file(name)
        or _INDEX.fullmatch(name) is not None
    )


def is_tokenizer_file(name: str) -> bool:
    """Whether a name is that of a tokenizer file."""
    return name in TOKENIZER_FILES


# ---- reading -------------------------------------------------------------------------------


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
        _check_digests(digests)
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
            found, status = _sha256(file), os.fstat(file.fileno())
    _compare(folder, name, digests, found)
    return path, status


def verify(folder: Path) -> Digests:
    """Check every listed file of a checkpoint folder against its manifest.

    Returns:
        The manifest's digests.

    Raises:
        CheckpointError: as `read` and `contents`.
    """
    digests = read(folder)
    for name in digests:
        check(folder, name, digests)
    return digests


def model_bytes(folder: Path) -> int:
    """Bytes on disk of the files the model loads from: no receipt, samples or tokenizer."""
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
            f"there is no checkpoint folder {folder.absolute()}; check the path and the current "
            "folder, or, if the model is on a hub, download it with "
            "huggingface_hub.snapshot_download()"
        )


def _check_digests(digests: object) -> None:
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


def _sha256(file: BinaryIO) -> str:
    digest, left = hashlib.sha256(), os.fstat(file.fileno()).st_size
    while left and (chunk := file.read(min(left, 1 << 20))):
        digest.update(chunk)
        left -= len(chunk)
    return digest.hexdigest()


# ---- writing -------------------------------------------------------------------------------


@contextmanager
def saving_model(folder: Path) -> Iterator[Path]:
    """Yield an empty folder to write a model in; on success its files replace the old model.

    The manifest then lists the new files and the tokenizer in `folder`. Nothing of an earlier model
    there remains, including samples of its training text. Other files stay.

    All files are complete on disk before the first is renamed into place. The manifest is renamed
    after them, and files that it no longer lists are deleted last. So whenever this is interrupted,
    `folder` holds the old model, the new one, or a mixture that loading refuses because digests
    differ.

    Raises:
        CheckpointError: if `folder` is a file or cannot be written, or on any `OSError` or
            `SafetensorError` inside. Before the first rename, this leaves `folder` as it was.
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

    If `folder` has a manifest, it then lists the tokenizer, and no longer lists samples encoded by
    another tokenizer. A manifest in another format stays as it is: only saving the model again
    updates the format. Files that no manifest lists may be overwritten, but are never deleted.

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
        CheckpointError: as `saving_model`, or if no complete model was saved.
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
    """List the tokenizer files in a checkpoint folder in its manifest, as they are now.

    Raises:
        CheckpointError: if the folder has no manifest, or cannot be written.
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
    except (OSError, ValueError) as error:  # ValueError: no system allows such a name
        raise CheckpointError(
            f"cannot write a checkpoint to {shown(str(folder))}: {error}"
        ) from error
    try:
        with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder) as name:
            yield Path(name)
    except BaseException as error:
        if is_new:
            with suppress(OSError):  # it was never created
                folder.rmdir()
        if isinstance(error, OSError | SafetensorError):
            raise CheckpointError(f"cannot write a checkpoint to {folder}: {error}") from error
        raise


def _any_manifest(folder: Path) -> tuple[object, Digests]:
    """Format and entries of a manifest in any format; None and no entries if it is unreadable."""
    try:
        content = read_json(folder / MANIFEST)
        version, digests = content["format_version"], content["sha256"]
        _check_digests(digests)
    except (OSError, ValueError, KeyError, TypeError):
        return None, {}
    return version, dict(digests)


def _others(folder: Path, owns: Callable[[str], bool]) -> Digests:
    """The manifest's entries for other existing files, those that `owns` does not claim."""
    _, listed = _any_manifest(folder)
    return {name: x for name, x in listed.items() if not owns(name) and (folder / name).is_file()}


def _earlier_model(folder: Path) -> set[str]:
    """Files of an earlier model: those listed, and those that could be taken for its weights."""
    listed = set(filter(is_model_file, _any_manifest(folder)[1]))
    return listed | set(filter(_WITHOUT_VARIANT.fullmatch, os.listdir(folder)))


def _tokenizer_in(folder: Path) -> Digests:
    """Digests of the tokenizer's files in a folder; none without the main tokenizer file."""
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
    """Move what was written into a folder, with a manifest if `digests` is given."""
    names = sorted(own)
    manifest = {"format_version": FORMAT_VERSION, "sha256": dict(sorted((digests or {}).items()))}
    (staged / MANIFEST).write_text(to_json(manifest), encoding="utf-8")
    for name in names:  # safetensors makes files that only their owner can read
        (staged / name).chmod((staged / MANIFEST).stat().st_mode)
    for name in names if digests is None else [*names, MANIFEST]:
        os.replace(staged / name, folder / name)
    for name in stale - own.keys():
        if (folder / name).is_file() or (folder / name).is_symlink():
            (folder / name).unlink()
