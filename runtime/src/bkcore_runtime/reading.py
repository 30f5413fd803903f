"""Reading files that somebody else may have written: regular files of bounded size only.

What cannot be read raises `OSError` or `ValueError`. The caller turns these into an error of its
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

from bkcore_runtime.errors import CheckpointError

JSON_BYTES = 16 << 20
"""More than any JSON file that this library writes."""

_DEPTH = 64

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 100


def open_regular(path: Path) -> BinaryIO:
    """Open a file for reading, without ever blocking on a pipe.

    Raises:
        OSError: if it cannot be opened, or is a folder, a pipe or a device.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):  # opening a device may already have effects
        raise OSError(f"{path} is not a regular file")
    file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(f"{path} is not a regular file")
    return file


def read_bytes(path: Path, limit: int = JSON_BYTES) -> bytes:
    """Read all of a small file.

    Raises:
        OSError: as `open_regular`.
        ValueError: if it has more than `limit` bytes.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise ValueError(f"{path} has {size:,} bytes, but the limit is {limit:,}")
        return file.read(size)  # a file in /proc may go on without end


def parse_json(content: bytes) -> Any:
    """Parse JSON in UTF-8.

    Raises:
        ValueError: if the content is not JSON, or lists and objects are nested too deeply.
    """
    try:
        value = json.loads(content.decode())
        _check_depth(value, _DEPTH)
    except RecursionError as error:
        raise ValueError(f"it is nested more than {_DEPTH} deep") from error
    return value


def read_json(path: Path) -> Any:
    """Read a small JSON file; raises errors as `read_bytes` and `parse_json`."""
    return parse_json(read_bytes(path))


def shown(value: object) -> str:
    """A value as text for a message: its `repr`, shortened if long."""
    try:
        return _SHORT.repr(value)
    except ValueError:  # Python refuses to print integers of thousands of digits
        return f"an {type(value).__name__} too long to print"


@contextmanager
def foreign(what: str) -> Iterator[None]:
    """Turn anything a library raises on foreign content inside a with block into one error.

    Raises:
        CheckpointError: "`what` is damaged", with the reason.
    """
    try:
        yield
    except CheckpointError:
        raise
    except BaseException as error:
        # A panic in Rust is not an `Exception`; interruptions must pass.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise CheckpointError(f"{what} is damaged: {shortened(error)}") from error


def shortened(error: BaseException) -> str:
    """An error's message on one line, shortened if long; its class name if it has no message."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:300] + " ..."


def _check_depth(value: Any, left: int) -> None:
    if isinstance(value, dict | list):
        if not left:
            raise ValueError(f"it is nested more than {_DEPTH} deep")
        for part in value.values() if isinstance(value, dict) else value:
            _check_depth(part, left - 1)
