"""What is printed: values as they are, on a terminal that may be full, closed or of few letters."""

from __future__ import annotations

import errno
import math
import os
import re
from contextlib import suppress
from typing import Any, TextIO

import rich.console
from rich.text import Text

_HUGE = 1e5
"""From there on a perplexity means nothing but that, and is too long for a table."""

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


class Console(rich.console.Console):
    """A console that takes no part of a text for markup: brackets in a name are brackets.

    Styles are given beside the text. Characters that would steer a terminal are shown as escapes.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """As rich's, which tables and titles go through, too."""
        return super().render_str(visible(text), **options)


def say(console: rich.console.Console, line: str) -> None:
    """Print a line as it is on any console, and leave it to the terminal to wrap it."""
    console.print(Text(visible(line)), soft_wrap=True)


def warn(console: rich.console.Console, line: str) -> None:
    """Print a line that nobody is to miss, as `say` prints others."""
    console.print(Text(visible(line), style="bold yellow"), soft_wrap=True)


def visible(text: str) -> str:
    """A text with escapes for control characters, line ends and tabs apart, and lone surrogates."""
    return _CONTROL.sub(lambda found: ascii(found[0])[1:-1], text)


def number(value: float | None, form: str) -> str:
    """A number in a format, as a power of ten where it is huge; a dash for one that is not known,
    or not finite."""
    if value is None or not math.isfinite(value):
        return "-"
    if abs(value) < _HUGE or form[-1] in "eg":
        return format(value, form)
    return format(value, f"{'+' if form.startswith('+') else ''}.0e")


def bits_per_byte(ppl_byte: float | None, form: str = ".3f") -> str:
    """What a perplexity per byte is in bits, for a table."""
    return number(None if ppl_byte is None else math.log2(ppl_byte), form)


class LastingStream:
    """A stream for all that a command prints, which ends no work.

    What the encoding has no letters for becomes a question mark. After the first error, which
    `error` holds, everything is dropped.

    Args:
        stream: where it goes; None is closed.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream
        self.error: OSError | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    @property
    def encoding(self) -> str:
        return getattr(self._stream, "encoding", None) or "utf-8"

    def isatty(self) -> bool:
        return self._stream is not None and self._stream.isatty()

    def write(self, text: str) -> int:
        if self.error is None:
            try:
                if self._stream is None:
                    raise OSError(errno.EBADF, os.strerror(errno.EBADF))
                self._stream.write(text.encode(self.encoding, "replace").decode(self.encoding))
            except OSError as error:
                self._fail(error)
        return len(text)

    def flush(self) -> None:
        if self.error is None and self._stream is not None:
            try:
                self._stream.flush()
            except OSError as error:
                self._fail(error)

    def _fail(self, error: OSError) -> None:
        """Note the error, and drop what stands in the buffer: Python flushes it at its end."""
        self.error = error
        with suppress(OSError, AttributeError):  # no stream, or one without a file
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())  # type: ignore[union-attr]
            os.close(nowhere)
