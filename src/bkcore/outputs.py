"""Files and folders that bkcore writes: tested before the work, written completely or not at all.

A path that is not a regular file is written to directly: a pipe, a terminal, /dev/null, and the
open files behind /dev/stdout or a shell's `>(command)`. A link stays, and its target is replaced.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import takewhile
from pathlib import Path
from typing import Any

from bkcore.errors import InputError, OutputError

_MOST_LINKS = 40


def prepare_folder(folder: Path) -> None:
    """Test whether a folder can be written in, without leaving a trace.

    Raises:
        InputError: if it cannot be created, or nothing can be written there.
    """
    with _having(folder):
        pass


def prepare_file(path: Path) -> None:
    """Test whether a file can be written, without leaving a trace.

    Raises:
        InputError: if it is a folder or a socket, its folder cannot be created or written in, its
            name is too long, or it is write-protected.
    """
    try:
        if (number := _descriptor(path)) is not None:
            os.write(number, b"")
            return
        target, status = _target(path)
        if status is not None and (reason := _refusal(target, status)):
            raise InputError(f"{path} {reason}")
        if status is None or stat.S_ISREG(status.st_mode):
            with _having(target.parent), _staged(target) as staged:
                staged.touch()
    except InputError:
        raise
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path} cannot be written ({_reason(error)}); name another file"
        ) from error


def is_special(path: Path) -> bool:
    """Whether a path is written to directly, such as a pipe or /dev/null."""
    if _descriptor(path) is not None:
        return True
    status = _target(path)[1]
    return status is not None and not stat.S_ISREG(status.st_mode)


def write_bytes(content: bytes, path: Path) -> None:
    """Write a file and flush it to disk, creating its folder if missing.

    An existing file is replaced; the new one keeps its mode, and its owner and group if permissions
    allow. If anything fails, the old file stays as it was.

    Raises:
        OutputError: if it cannot be written.
    """
    try:
        if (number := _descriptor(path)) is not None:
            if sys.stdout is not None:
                sys.stdout.flush()  # keep the order with what was printed before
            with os.fdopen(os.dup(number), "wb") as file:
                file.write(content)
            return
        target, status = _target(path)
        if status is None or stat.S_ISREG(status.st_mode):
            _replace(target, content, status)
        else:
            with target.open("wb") as file:
                file.write(content)
    except (OSError, ValueError) as error:
        raise OutputError(f"{path} could not be written: {_reason(error)}") from error


def write_text(text: str, path: Path) -> None:
    """Write a text in UTF-8, with lone surrogates as escapes; otherwise as `write_bytes`."""
    write_bytes(text.encode(errors="backslashreplace"), path)


def write_json(report: dict[str, Any], path: Path) -> None:
    """Write a report as JSON; see `to_json` and `write_bytes`."""
    write_text(to_json(report), path)


def to_json(content: Any, indent: int | None = 2) -> str:
    """Format content as JSON in ASCII, with a final line break.

    JSON has neither infinities nor NaN: they become null, and `NAME_reason` beside `NAME` says why.
    """
    return json.dumps(_finite(content), indent=indent, allow_nan=False) + "\n"


def _finite(content: Any) -> Any:
    if isinstance(content, float):
        return content if math.isfinite(content) else None
    if isinstance(content, (list, tuple)):
        return [_finite(value) for value in content]
    if not isinstance(content, dict):
        return content
    found: dict[Any, Any] = {}
    for name, value in content.items():
        found[name] = _finite(value)
        if (reason := _why_null(value)) is not None:
            found[f"{name}_reason"] = reason
    return found


def _why_null(value: Any) -> str | None:
    """Why a number, or one in a list, must be null in JSON; None if it need not be."""
    if isinstance(value, (list, tuple)):
        return next(filter(None, map(_why_null, value)), None)
    if not isinstance(value, float) or math.isfinite(value):
        return None
    return "not a number" if math.isnan(value) else "infinite, or beyond what a float64 can hold"


@contextmanager
def _having(folder: Path) -> Iterator[None]:
    """Create a folder and test writing inside a with block; then remove what was created."""
    try:
        missing = list(takewhile(lambda each: not each.exists(), [folder, *folder.parents]))
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(prefix=".trying-", dir=folder):
                pass
            yield
        finally:
            for each in missing:
                with suppress(OSError):  # it was never created, or another process uses it by now
                    each.rmdir()
    except InputError:
        raise
    except (OSError, ValueError) as error:
        raise InputError(
            f"{folder} cannot be used as a folder to write in ({_reason(error)}); name another one"
        ) from error


def _descriptor(path: Path) -> int | None:
    """The descriptor number if a path names an open file of this process, directly or by links."""
    place = os.path.abspath(path)
    for _ in range(_MOST_LINKS):
        named = re.fullmatch(rf"(?:/dev|/proc/self|/proc/{os.getpid()})/fd/(\d+)", place)
        if named is not None:
            return int(named[1])
        if not os.path.islink(place):
            return None
        place = os.path.abspath(os.path.join(os.path.dirname(place), os.readlink(place)))
    return None


def _target(path: Path) -> tuple[Path, os.stat_result | None]:
    """The resolved path and its status, which is None if nothing is there."""
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        status = None
    return Path(os.path.realpath(path)), status


def _refusal(target: Path, status: os.stat_result) -> str | None:
    """Why an existing file cannot be written; None if it can."""
    if stat.S_ISDIR(status.st_mode):
        return "is a folder; name a file in it"
    if stat.S_ISSOCK(status.st_mode):
        return "is a socket, which cannot be written like a file; name another one"
    if not os.access(target, os.W_OK):
        return "may not be written (Permission denied); name another file"
    return None


@contextmanager
def _staged(target: Path) -> Iterator[Path]:
    """A temporary path to write a file to before renaming it; cleaned up in any case."""
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=target.parent) as folder:
        yield Path(folder) / target.name


def _replace(target: Path, content: bytes, old: os.stat_result | None) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with _staged(target) as staged:
        with staged.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if old is not None:
            with suppress(PermissionError):  # only root can change a file's owner
                os.chown(staged, old.st_uid, old.st_gid)
            staged.chmod(stat.S_IMODE(old.st_mode))
        os.replace(staged, target)


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
