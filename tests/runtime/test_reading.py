"""Reading what strangers wrote: bounded, and never waiting."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from bkcore_runtime.errors import CheckpointError
from bkcore_runtime.reading import foreign, open_regular, parse_json, read_bytes, read_json, shown


def test_no_more_than_the_limit_is_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"12345")
    assert read_bytes(tmp_path / "file", 5) == b"12345"
    with pytest.raises(ValueError, match="has 5 bytes, but the limit is 4"):
        read_bytes(tmp_path / "file", 4)


@pytest.mark.parametrize("what", ["pipe", "folder", "/dev/zero", "/dev/tty"])
def test_only_regular_files_are_opened(tmp_path: Path, what: str) -> None:
    path = Path(what) if what.startswith("/") else tmp_path / what
    if what == "pipe":
        os.mkfifo(path)
    elif what == "folder":
        path.mkdir()
    with pytest.raises(OSError, match="not a regular file"):
        open_regular(path)


@pytest.mark.skipif(not Path("/proc/version").exists(), reason="/proc is of Linux")
def test_files_that_do_not_say_their_size_have_nothing_to_read() -> None:
    """Some of them, such as /proc/kmsg, have no end."""
    assert read_bytes(Path("/proc/version")) == b""


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[" * 10**6, b"[" * 65 + b"]" * 65])
def test_what_is_no_json(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(ValueError, match=r".") as caught:
        read_json(tmp_path / "file")
    assert len(str(caught.value)) < 300


def test_nesting_within_reason_is_read() -> None:
    assert parse_json(b"[" * 64 + b"]" * 64)


def test_long_values_are_shown_in_part() -> None:
    assert shown("x") == "'x'"
    assert len(shown("x" * 10**6)) < 200
    assert len(shown([["x" * 1000] * 1000] * 1000)) < 5000
    assert shown(10**5000) == "an int too long to print"
    assert (
        shown("layers.0.experts.experts.3.down.weight")
        == "'layers.0.experts.experts.3.down.weight'"
    )


def test_what_libraries_raise_becomes_one_error() -> None:
    panic = type("PanicException", (BaseException,), {})
    for error in (ValueError("x"), RecursionError(), MemoryError(), panic("x")):
        with pytest.raises(CheckpointError, match="the file is damaged: "), foreign("the file"):
            raise error
    for error in (KeyboardInterrupt(), SystemExit()):
        with pytest.raises(type(error)), foreign("the file"):
            raise error
    with pytest.raises(CheckpointError, match=r"^as it is$"), foreign("the file"):
        raise CheckpointError("as it is")
