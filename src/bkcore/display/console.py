"""Printing: text as it is, to a stream that may be full, closed or lack characters."""

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
"""From here on a perplexity only means "huge", and its digits do not fit in a table."""

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


class Console(rich.console.Console):
    """A console that never interprets text as markup, so that brackets in a name stay brackets.

    Styles are given separately. Characters that would control the terminal are shown as escapes.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """As in rich; tables and titles also go through this."""
        return super().render_str(visible(text), **options)


def say(console: rich.console.Console, line: str) -> None:
    """Print a line as it is on any console; the terminal wraps it."""
    console.print(Text(visible(line)), soft_wrap=True)


def warn(console: rich.console.Console, line: str) -> None:
    """Print a warning, highlighted; otherwise as `say`."""
    console.print(Text(visible(line), style="bold yellow"), soft_wrap=True)


def visible(text: str) -> str:
    """Escape lone surrogates and control characters, except line breaks and tabs."""
    return _CONTROL.sub(lambda found: ascii(found[0])[1:-1], text)


def number(value: float | None, form: str) -> str:
    """Format a number, in scientific notation if it is huge; a dash if it is unknown or not
    finite."""
    if value is None or not math.isfinite(value):
        return "-"
    if abs(value) < _HUGE or form[-1] in "eg":
        return format(value, form)
    return format(value, f"{'+' if form.startswith('+') else ''}.0e")


def bits_per_byte(ppl_byte: float | None, form: str = ".3f") -> str:
    """A perplexity per byte as bits per byte, for a table."""
    return number(None if ppl_byte is None else math.log2(ppl_byte), form)


class LastingStream:
    """A stream for a command's output whose errors never end the work.

    Characters that the encoding lacks become question marks. After the first error, which is kept
    in `error`, everything is dropped.

    Args:
        stream: the underlying stream; None if it is closed.
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
        """Keep the error, and discard the buffer, which Python would flush at exit."""
        self.error = error
        with suppress(OSError, AttributeError):  # no stream, or one without a file
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())  # type: ignore[union-attr]
            os.close(nowhere)
