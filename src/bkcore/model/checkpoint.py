"""Checkpoint folders that are written whole and checked before they are read.

A folder holds safetensors and JSON, and `bkcore.json`: the format version and the SHA-256 of every
file the model wrote. A file that was cut short or changed is refused by name.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bkcore.errors import CheckpointError

FORMAT_VERSION = 4
"""Version 1 was of models that brought to unit mean square what their heads found, version 2 of
models whose embedded tokens entered the residual stream as they are."""

MANIFEST = "bkcore.json"
RECEIPT = "receipt.json"


@contextmanager
def writing(folder: Path) -> Iterator[Path]:
    """Yield an empty folder to write in; on success its files move into `folder`.

    Files are complete on disk before the first is renamed into place, and the manifest comes last.
    If anything fails before that, `folder` is left as it was.

    Raises:
        CheckpointError: if `folder` is a file or cannot be written.
    """
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder} is a file; name a folder for the checkpoint")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        staging = tempfile.TemporaryDirectory(prefix=".saving-", dir=folder)
    except OSError as error:
        raise CheckpointError(f"cannot write a checkpoint to {folder}: {error}") from error
    with staging as name:
        staged = Path(name)
        yield staged
        files = sorted(path.name for path in staged.iterdir())
        manifest = {
            "format_version": FORMAT_VERSION,
            "sha256": {file: _sha256(staged / file) for file in files},
        }
        (staged / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
        for file in files:  # safetensors makes files that nobody but their owner can read
            (staged / file).chmod((staged / MANIFEST).stat().st_mode)
        for file in [*files, MANIFEST]:
            os.replace(staged / file, folder / file)


def verify(folder: Path) -> None:
    """Check a checkpoint folder against its manifest.

    Raises:
        CheckpointError: if there is no such folder, a file is missing, truncated or altered, or the
            format is not the one that this version reads.
    """
    if folder.is_file():
        raise CheckpointError(f"{folder} is a file; a checkpoint is a folder")
    if not folder.is_dir():
        raise CheckpointError(
            f"there is no checkpoint folder {folder} in {Path.cwd()}; from a hub, download it "
            "first with huggingface_hub.snapshot_download()"
        )
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        version, digests = int(manifest["format_version"]), dict(manifest["sha256"])
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{folder} is not a bkcore checkpoint: it has no {MANIFEST}"
        ) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / MANIFEST} cannot be read: {error}") from error
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"{folder} has checkpoint format {version}; this bkcore reads {FORMAT_VERSION}. "
            "Install a newer bkcore"
        )
    if version < FORMAT_VERSION:
        raise CheckpointError(
            f"{folder} has checkpoint format {version}, of a model that this bkcore no longer has; "
            f"it reads {FORMAT_VERSION}, and what these weights would compute now is not what they "
            "were trained for. Train the model again, or load it with the bkcore that saved it"
        )
    for file, digest in digests.items():
        if not (folder / file).is_file():
            raise CheckpointError(f"the checkpoint {folder} lacks its file {file}")
        if _sha256(folder / file) != digest:
            raise CheckpointError(
                f"{folder / file} was truncated or altered since it was saved "
                "(its SHA-256 differs); restore it or save the model again"
            )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def model_bytes(folder: Path) -> int:
    """Bytes on disk of the files the model loads from: tokenizer, manifest and receipt apart."""
    return sum((folder / file).stat().st_size for file in files(folder) if file != RECEIPT)


def files(folder: Path) -> list[str]:
    """Names of the files that the model wrote, by the manifest of a folder."""
    return list(json.loads((folder / MANIFEST).read_text())["sha256"])
