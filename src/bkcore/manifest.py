"""The manifest of a checkpoint folder: every file that is loaded from it, with its SHA-256.

A folder holds safetensors and JSON files, and `bkcore.json` with the format version and the
digests. A model and its tokenizer are saved separately, in either order, and each keeps the other's
entries. `bkcore_runtime.manifest` reads a manifest and says what it refuses; this module hands that
on, and writes one.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from bkcore.errors import CheckpointError
from bkcore.outputs import to_json
from bkcore.reading import open_regular, read_json, shown
from bkcore_runtime import manifest as _runtime

FORMAT_VERSION = _runtime.FORMAT_VERSION

MANIFEST = _runtime.MANIFEST
RECEIPT = "receipt.json"
CONFIG = _runtime.CONFIG
GENERATION = _runtime.GENERATION
SAMPLES = "calibration.safetensors"
"""Token ids from the training text, encoded by the tokenizer in the same folder."""

TOKENIZER = _runtime.TOKENIZER
TOKENIZER_FILES = _runtime.TOKENIZER_FILES

_INDEX = re.compile(r"model\.safetensors\.index(\.[A-Za-z0-9_-]+)?\.json")
_WITHOUT_VARIANT = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")

_HUGE_PAGE = 2**21

Digests = _runtime.Digests

read = _runtime.read
contents = _runtime.contents
check = _runtime.check
is_same = _runtime.is_same
is_weights_file = _runtime.is_weights_file
is_tokenizer_file = _runtime.is_tokenizer_file


def is_model_file(name: str) -> bool:
    """Whether a name is that of a model's own file, deleted when another model replaces it."""
    return (
        name in (CONFIG, GENERATION, RECEIPT, SAMPLES)
        or is_weights_file(name)
        or _INDEX.fullmatch(name) is not None
    )


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
        _runtime.check_digests(digests)
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
    for path in staged.iterdir():
        if path.stat().st_size >= _HUGE_PAGE:
            _drop_from_memory(path)
    return {path.name: _digest(path) for path in staged.iterdir()}


def _drop_from_memory(path: Path) -> None:
    """Have the next reader, `sha256`, read a file from the disk, and so in huge pages."""
    with open_regular(path) as file:
        os.fsync(file.fileno())
        with suppress(AttributeError):  # only Linux has it
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _digest(path: Path) -> str:
    with open_regular(path) as file:
        return _runtime.sha256(file)


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
