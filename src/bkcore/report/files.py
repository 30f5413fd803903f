"""Where reports go: refused before the work where they cannot go, or would cost what is there."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterable, Mapping
from io import BytesIO
from itertools import combinations
from pathlib import Path
from typing import Any

from bkcore import manifest
from bkcore.errors import InputError
from bkcore.outputs import is_special, prepare_file, prepare_folder, write_bytes
from bkcore.reading import read_json

_OF_DATA = {"dataset_dict.json", "dataset_info.json", "state.json"}


def prepare(
    files: Mapping[str, Path | None],
    folders: Mapping[str, Path | None] | None = None,
    read: Iterable[Path | str | None] = (),
) -> None:
    """Try all that a command is going to write, and leave everything as it is.

    Args:
        files, folders: by the options that name them; None is not asked for.
        read: files and folders that the command reads.

    Raises:
        InputError: if something cannot be written, two outputs are in each other's way, or a file
            that is read, or belongs to a model, would be lost.
    """
    wanted = {name: path for name, path in files.items() if path is not None}
    places = {name: path for name, path in (folders or {}).items() if path is not None}
    for path in wanted.values():
        prepare_file(path)
    for path in places.values():
        prepare_folder(path)
    real = {name: path for name, path in wanted.items() if not is_special(path)}
    for (one, first), (other, second) in combinations([*real.items(), *places.items()], 2):
        if first.resolve() == second.resolve():
            raise InputError(f"{one} and {other} are both {first}; name another one")
    for name, path in real.items():
        _check_harmless(name, path, places, read)


def _check_harmless(
    name: str, path: Path, folders: Mapping[str, Path], read: Iterable[Path | str | None]
) -> None:
    """Raise `InputError` if a file to write is one to read, or stands where a folder is to be."""
    place = path.resolve()
    for other, folder in folders.items():
        if place in folder.resolve().parents:
            raise InputError(f"{name} is {path}, in which {other} is to be a folder, {folder}")
        if place.parent == folder.resolve() and _is_of_checkpoint(place.name):
            raise InputError(f"{name} is {path}, a file that a model in {folder} has")
    is_input = (
        place.suffix in (".txt", ".arrow")
        or place.name in _OF_DATA
        or _is_of_checkpoint(place.name)
    )
    for source in read:
        if source is None:
            continue
        top = Path(source).resolve()
        if place == top or (is_input and place.exists() and top in place.parents):
            raise InputError(f"{name} is {path}, which is read; name another file")


def _is_of_checkpoint(name: str) -> bool:
    return (
        name == manifest.MANIFEST
        or manifest.is_model_file(name)
        or manifest.is_tokenizer_file(name)
    )


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
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise InputError(
            f"{folder} may hold a model, but its config.json cannot be read ({error}); "
            "name another folder, or delete it"
        ) from error
    if is_float:
        raise InputError(
            f"{folder} holds a float model, which would be lost; name another folder, or delete it"
        )


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


def write_plot(figure: Any, path: Path) -> None:
    """Write a figure of matplotlib in the format that the name of a file ends in.

    Raises:
        OutputError: if it cannot be written.
    """
    picture = BytesIO()
    figure.savefig(picture, dpi=150, format=path.suffix.removeprefix("."))
    write_bytes(picture.getvalue(), path)
