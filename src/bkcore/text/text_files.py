"""Text files, read and checked piece by piece."""

import codecs
from collections.abc import Iterable, Iterator
from pathlib import Path

from bkcore.errors import DataError

_PIECE_BYTES = 1 << 20


def read_pieces(path: Path) -> Iterator[str]:
    r"""Read a UTF-8 file; a byte order mark is dropped and ``\r\n`` is read as ``\n``.

    Yields:
        Pieces of up to about a million characters; none is empty.

    Raises:
        DataError: if the file is missing, cannot be read, or is not UTF-8 text.
    """
    held = ""
    for number, piece in enumerate(_decoded(path)):
        text = held + (piece.removeprefix("\ufeff") if number == 0 else piece)
        # The line feed after a carriage return may be in the next piece.
        held = "\r" if text.endswith("\r") else ""
        text = text[: len(text) - len(held)].replace("\r\n", "\n")
        if text:
            yield text
    if held:
        yield held


def with_line_end(pieces: Iterable[str]) -> Iterator[str]:
    """Append a line end if the last line of a text lacks one, so that texts can be joined."""
    last = "\n"
    for piece in pieces:
        yield piece
        last = piece[-1:] or last
    if last != "\n":
        yield "\n"


def _decoded(path: Path) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    done = 0
    for content in _contents(path):
        if (nul := content.find(b"\0")) >= 0:
            raise DataError(
                f"{str(path)!r} holds NUL bytes, the first at byte {done + nul}, so it is binary "
                "or UTF-16; save it as UTF-8 text"
            )
        waiting = len(decoder.getstate()[0])
        try:
            text = decoder.decode(content, final=not content)
        except UnicodeDecodeError as error:
            raise DataError(
                f"{str(path)!r} is not UTF-8: byte {done - waiting + error.start} cannot be "
                "decoded; save it as UTF-8 text"
            ) from error
        done += len(content)
        if text:
            yield text


def _contents(path: Path) -> Iterator[bytes]:
    """Yield the bytes of a file in pieces, with one empty piece at the end."""
    try:
        with path.open("rb") as file:
            while content := file.read(_PIECE_BYTES):
                yield content
            yield b""
    except FileNotFoundError:
        raise DataError(
            f"there is no file {str(path)!r}; a corpus folder holds train.txt and valid.txt"
        ) from None
    except OSError as error:
        raise DataError(
            f"{str(path)!r} cannot be read ({error.strerror}); "
            "make it a regular file that you may read"
        ) from error
