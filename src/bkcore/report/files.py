"""Where reports go: checked before the work begins, written whole or not at all."""

from __future__ import annotations

import importlib.util
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from bkcore.errors import InputError
from bkcore.reading import read_json


def prepare_folder(folder: Path) -> None:
    """Make a folder, so that hours of work do not end at a name that cannot be written.

    Raises:
        InputError: if it is a file, or cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"{folder} cannot be a folder to write in ({error.strerror}); name another one"
        ) from error


@contextmanager
def prepared_folders(*folders: Path) -> Iterator[None]:
    """Have folders to write in inside a with block; if it fails, those made for it go, if empty.

    Raises:
        InputError: as `prepare_folder`.
    """
    made = [folder for folder in folders if not folder.exists()]
    try:
        for folder in folders:
            prepare_folder(folder)
        yield
    except BaseException:
        for folder in made:
            with suppress(OSError):  # something was written, or it was never made
                folder.rmdir()
        raise


def refuse_model(folder: Path) -> None:
    """Make sure that no model is lost which cannot be made again in minutes, as quantized ones can.

    Raises:
        InputError: if the folder holds a model that is not quantized, or may hold one.
    """
    path = folder / "config.json"
    if not os.path.lexists(path):
        return
    try:
        config = read_json(path)
        quantization = config.get("quantization") or {"state": "float"}
        is_float = quantization.get("state", "float") == "float"
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(
            f"{folder} may hold a model, but its config.json cannot be read ({error}); "
            "name another folder, or delete it"
        ) from error
    if is_float:
        raise InputError(
            f"{folder} holds a float model, which would be lost; name another folder, or delete it"
        )


def prepare_file(path: Path) -> None:
    """Make sure that a file can be written later.

    Raises:
        InputError: if it is a folder, or its folder cannot be made.
    """
    if path.is_dir():
        raise InputError(f"{path} is a folder; name a file in it")
    prepare_folder(path.parent)


def prepare_plot(path: Path) -> None:
    """Make sure that a picture can be drawn and written later.

    Raises:
        InputError: if matplotlib is missing, the file is neither .png nor .svg, or as in
            `prepare_file`.
    """
    if path.suffix not in (".png", ".svg"):
        raise InputError(f"the plot must be a .png or .svg file, got {path}")
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError("a plot needs matplotlib: pip install 'bkcore[plot]'")
    prepare_file(path)


def write_json(report: dict[str, Any], path: Path) -> None:
    """Write a report whole or not at all.

    Raises:
        InputError: if it cannot be written.
    """
    text = json.dumps(report, indent=2) + "\n"
    try:
        with tempfile.TemporaryDirectory(prefix=".saving-", dir=path.parent) as folder:
            staged = Path(folder) / path.name
            staged.write_text(text)
            os.replace(staged, path)
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error}); name another file") from error
