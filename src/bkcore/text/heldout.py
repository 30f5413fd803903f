"""A validation part for texts without one: every twentieth block of lines."""

import re
from collections.abc import Iterable, Iterator

BLOCK_CHARACTERS = 2_000
"""A block ends with the line in which it reaches this length."""

VALID_BLOCKS = 1_000
"""At most this many blocks are held out, the first ones, since scored text stays in memory."""

_EVERY = 20
_LONGEST_BLOCK = 1 << 16
# Where a block may end, best places first.
_ENDS = (
    re.compile("\n"),
    re.compile("[\r\v\f\x85\u2028\u2029]"),
    re.compile(r"\s"),
)


def split_blocks(pieces: Iterable[str]) -> Iterator[tuple[bool, str]]:
    """Cut a text into blocks, and say whether each is held out.

    The blocks depend only on the text, not on how it is cut into pieces. A line longer than 65,536
    characters is cut: after a line end other than a line feed, such as a carriage return; if it has
    none, after a blank; otherwise at that length.

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
    for end in _ENDS:
        if found := end.search(text, start + BLOCK_CHARACTERS - 1, limit):
            return found.end()
    return limit
