"""Reading files that somebody else may have written: bounded, regular files only, no tracebacks.

What cannot be read raises `OSError` or `ValueError`, which the caller turns into an error of its
own that says what to do.
"""

from __future__ import annotations

import json
import os
import reprlib
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from bkcore.errors import CheckpointError

JSON_BYTES = 16 << 20
"""More than any JSON file that this library writes."""

_DEPTH = 64

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 100


def open_regular(path: Path) -> BinaryIO:
    """Open a file for reading, without waiting for anybody who might write it.

    Raises:
        OSError: if it cannot be opened, or is a folder, a pipe or a device.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):  # to open a device may already do something
        raise OSError(f"{path} is not a regular file")
    file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(f"{path} is not a regular file")
    return file


def read_bytes(path: Path, limit: int = JSON_BYTES) -> bytes:
    """The whole of a small file.

    Raises:
        OSError: as `open_regular`.
        ValueError: if it has more bytes than `limit`.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise ValueError(f"{path} has {size:,} bytes; at most {limit:,} are read")
        return file.read(size)  # not what a file of /proc may add without end


def parse_json(content: bytes) -> Any:
    """What JSON in UTF-8 holds.

    Raises:
        ValueError: if it is no such thing, or lists and objects stand in each other too deeply.
    """
    try:
        value = json.loads(content.decode())
        _check_depth(value, _DEPTH)
    except RecursionError as error:
        raise ValueError(f"it is nested more than {_DEPTH} deep") from error
    return value


def read_json(path: Path) -> Any:
    """What a small JSON file holds; errors as in `read_bytes` and `parse_json`."""
    return parse_json(read_bytes(path))


def shown(value: object) -> str:
    """A value for a message: `repr`, or its beginning if that is long."""
    try:
        return _SHORT.repr(value)
    except ValueError:  # Python refuses to print integers of thousands of digits
        return f"an {type(value).__name__} that is too long to print"


@contextmanager
def foreign(what: str) -> Iterator[None]:
    """Turn whatever a library raises inside a with block, on content of a stranger, into one error.

    Raises:
        CheckpointError: "`what` is damaged", and the reason.
    """
    try:
        yield
    except CheckpointError:
        raise
    except BaseException as error:
        # A panic in Rust is no `Exception`; interruptions must go through.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise CheckpointError(f"{what} is damaged: {shortened(error)}") from error


def shortened(error: BaseException) -> str:
    """The message of an error on one line, or its beginning, with the name of what has none."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:300] + " ..."


def _check_depth(value: Any, left: int) -> None:
    if isinstance(value, dict | list):
        if not left:
            raise ValueError(f"it is nested more than {_DEPTH} deep")
        for part in value.values() if isinstance(value, dict) else value:
            _check_depth(part, left - 1)
