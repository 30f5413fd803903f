"""A validation part for texts that come without one: every twentieth block of lines."""

from collections.abc import Iterable, Iterator

BLOCK_CHARACTERS = 2_000
"""A block ends with the line in which it gets this long."""

VALID_BLOCKS = 1_000
"""At most so many blocks are held out, the first ones: what is scored stays in memory."""

_EVERY = 20
_LONGEST_BLOCK = 1 << 16


def split_blocks(pieces: Iterable[str]) -> Iterator[tuple[bool, str]]:
    """Cut a text into blocks, and say of each whether it is held out.

    The blocks depend on nothing but the text, however it is cut into pieces. A line that is longer
    than 65,536 characters may be cut.

    Yields:
        ``(held_out, block)``, in the order of the text.
    """
    held_out = 0
    for number, block in enumerate(_blocks(pieces)):
        is_valid = number % _EVERY == _EVERY - 1 and held_out < VALID_BLOCKS
        held_out += is_valid
        yield is_valid, block


def _blocks(pieces: Iterable[str]) -> Iterator[str]:
    buffer = ""
    for piece in pieces:
        buffer += piece
        start = 0
        while len(buffer) - start >= _LONGEST_BLOCK:
            end = _block_end(buffer, start)
            yield buffer[start:end]
            start = end
        buffer = buffer[start:]
    start = 0
    while start < len(buffer):
        end = _block_end(buffer, start)
        yield buffer[start:end]
        start = end


def _block_end(text: str, start: int) -> int:
    limit = min(start + _LONGEST_BLOCK, len(text))
    line_end = text.find("\n", start + BLOCK_CHARACTERS - 1, limit)
    return limit if line_end < 0 else line_end + 1
