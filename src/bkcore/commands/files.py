"""Output files: checked before the work; refused if unwritable or if they would destroy data."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import rich.console

from bkcore import manifest
from bkcore.commands.running import UnprintedError
from bkcore.display.console import say
from bkcore.display.plots import prepare_plot
from bkcore.errors import InputError, OutputError
from bkcore.outputs import is_special, prepare_file, prepare_folder, write_json, write_text
from bkcore.reading import read_json
from bkcore.text.corpus import check_place

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
        checkpoints: Iterable[Path | None] = (),
        data: str | None = None,
        read: Iterable[Path | str | None] = (),
    ) -> None:
        """Test everything that will be written, without leaving a trace, and look for what is read.

        Called before PyTorch and transformers are imported, which takes seconds.

        Args:
            folders: to be written in, by the option that names each; None for those not requested.
            checkpoints: folders of models that the command reads; None for those not requested.
            data: the text that it reads, as in `bkcore.text.load_split`.
            read: other files that it reads.

        Raises:
            InputError: if something cannot be written, two outputs are in each other's way, or a
                file that is read or belongs to a model would be lost.
            CheckpointError: if a checkpoint is missing or incomplete.
            DataError: if there is no text at that place.
        """
        named = {"--json": self.json, "--markdown": self.markdown, self.plot_option: self.plot}
        files = {name: path for name, path in named.items() if path is not None}
        places = {name: path for name, path in (folders or {}).items() if path is not None}
        models = [folder for folder in checkpoints if folder is not None]
        for name, path in files.items():
            (prepare_plot if name == self.plot_option else prepare_file)(path)
        for path in places.values():
            prepare_folder(path)
        real = {name: path for name, path in files.items() if not is_special(path)}
        for (one, first), (other, second) in combinations([*real.items(), *places.items()], 2):
            if first.resolve() == second.resolve():
                raise InputError(f"{one} and {other} are both {first}; name another one")
        for name, path in real.items():
            _check_harmless(name, path, places, [*models, data, *read])
        for folder in models:
            manifest.read(folder)
        check_place(data)

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
        writing = (
            (self.json, partial(write_json, report)),
            (self.markdown, partial(write_text, markdown)),
            (self.plot, draw),
        )
        failed = []
        try:
            for path, write in writing:
                try:
                    if path is not None:
                        write(path)
                except OutputError as error:
                    failed.append(str(error))
        finally:
            show()
        if failed:
            raise OutputError("; ".join(failed))
        sys.stdout.flush()
        if getattr(sys.stdout, "error", None) is not None:
            raise UnprintedError


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


def prepare_model(folder: Path, checkpoint: Path) -> None:
    """Test whether a model can be saved in a folder, without leaving a trace.

    Raises:
        InputError: if it is the folder of the checkpoint that is read, holds a float model or may
            hold one, or cannot be written in.
    """
    if folder.resolve() == checkpoint.resolve():
        raise InputError(f"{folder} is the checkpoint itself; name another folder")
    _refuse_float(folder)
    prepare_folder(folder)


def say_what_is_replaced(console: rich.console.Console, folders: Iterable[Path | None]) -> None:
    """Before the work, print which of these folders hold a model that will be replaced."""
    held = [str(each) for each in folders if each and os.path.lexists(each / manifest.CONFIG)]
    if held:
        what = "holds an earlier model" if len(held) == 1 else "hold earlier models"
        say(console, f"{', '.join(held)} {what}, to be replaced when the new one is complete")


def _refuse_float(folder: Path) -> None:
    """Refuse to overwrite a float model. (A quantized one can be made again in minutes.)

    Raises:
        InputError: if the folder holds a model that is not quantized, or may hold one.
    """
    path = folder / manifest.CONFIG
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
