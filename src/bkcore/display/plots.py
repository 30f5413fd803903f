"""Pictures: checked before the work, and written to files."""

from __future__ import annotations

import importlib.util
from io import BytesIO
from pathlib import Path
from typing import Any

from bkcore.errors import InputError
from bkcore.outputs import prepare_file, write_bytes


def prepare_plot(path: Path) -> None:
    """Check that a picture can be drawn and written later.

    Raises:
        InputError: if matplotlib is missing, the file is neither .png nor .svg, or as in
            `prepare_file`.
    """
    if path.suffix not in (".png", ".svg"):
        raise InputError(f"the plot must be a .png or .svg file, not {path}")
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError("a plot needs matplotlib; pip install 'bkcore[plot]'")
    prepare_file(path)


def write_plot(figure: Any, path: Path) -> None:
    """Write a matplotlib figure in the format given by the file's extension.

    Raises:
        OutputError: if it cannot be written.
    """
    picture = BytesIO()
    figure.savefig(picture, dpi=150, format=path.suffix.removeprefix("."))
    write_bytes(picture.getvalue(), path)
