"""Output files: checked before the work; refused if unwritable or if they would destroy data."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

from bkcore import manifest
from bkcore.commands.process import publish
from bkcore.display.plots import prepare_plot
from bkcore.errors import InputError
from bkcore.outputs import is_special, prepare_file, prepare_folder, write_json, write_text
from bkcore.reading import read_json

_OF_DATA = {"dataset_dict.json", "dataset_info.json", "state.json"}


@dataclass(frozen=True)
class Files:
    """The files that a command is asked to write; None for those not requested.

    Attributes:
        json: of `--json`.
        markdown: of `--markdown`.
        plot: the picture.
        plot_option: the option that names the picture.
    """

    json: Path | None = None
    markdown: Path | None = None
    plot: Path | None = None
    plot_option: str = "--plot"

    def prepare(
        self,
        folders: Mapping[str, Path | None] | None = None,
        read: Iterable[Path | str | None] = (),
    ) -> None:
        """Test everything that will be written, without leaving a trace; arguments as in `prepare`.

        Raises:
            InputError: as in `prepare` and `prepare_plot`.
        """
        if self.plot is not None:
            prepare_plot(self.plot)
        files = {"--json": self.json, "--markdown": self.markdown, self.plot_option: self.plot}
        prepare(files, folders, read)

    def publish(
        self,
        show: Callable[[], None],
        report: dict[str, Any],
        markdown: str = "",
        draw: Callable[[Path], None] = lambda path: None,
    ) -> None:
        """Write a result to the requested files, then print it.

        Args:
            show: prints it.
            report: for JSON.
            markdown: for Markdown.
            draw: draws it into a file.

        Raises:
            OutputError: at the end, if some of it could not be written or printed.
        """
        publish(
            show,
            (self.json, partial(write_json, report)),
            (self.markdown, partial(write_text, markdown)),
            (self.plot, draw),
        )


def prepare(
    files: Mapping[str, Path | None],
    folders: Mapping[str, Path | None] | None = None,
    read: Iterable[Path | str | None] = (),
) -> None:
    """Test everything that a command will write, without leaving a trace.

    Args:
        files, folders: by the option that names each; None for those not requested.
        read: files and folders that the command reads.

    Raises:
        InputError: if something cannot be written, two outputs are in each other's way, or a file
            that is read or belongs to a model would be lost.
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
    """Raise `InputError` if an output file is also read, or is in the way of a folder."""
    place = path.resolve()
    for other, folder in folders.items():
        if place in folder.resolve().parents:
            raise InputError(
                f"{name} is {path}, but {other} needs a folder inside it, {folder}; name another "
                "file"
            )
        if place.parent == folder.resolve() and _is_of_checkpoint(place.name):
            raise InputError(
                f"{name} is {path}, a file of the model in {folder}; name another file"
            )
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
    """Refuse to overwrite a float model. (A quantized one can be made again in minutes.)

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
