"""The command `bkcore-run`: continue a text with a checkpoint, without PyTorch."""

from __future__ import annotations

import argparse
import errno
import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING

from bkcore_runtime import __version__
from bkcore_runtime.errors import BKCoreError, InputError

if TYPE_CHECKING:
    from bkcore_runtime.engine import Engine

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
_INTERRUPTED, _BROKEN_PIPE = 130, 141
"""Exit codes: 128 and the number of SIGINT or SIGPIPE."""


def main() -> None:
    """Run the command with the arguments of the process.

    The exit code is 130 after an interruption, 141 if the output went into a closed pipe, and 2 for
    all other errors, each of which is one sentence.
    """
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run the command with some arguments, and return its exit code."""
    try:
        continue_text(_parser().parse_args(arguments))
    except KeyboardInterrupt:
        return _fail("interrupted", _INTERRUPTED, "\n")
    except BKCoreError as error:
        return _fail(str(error), 2)
    except _UnprintedError as error:
        _drop_output()
        if isinstance(error.cause, BrokenPipeError):
            return _BROKEN_PIPE
        return _fail(f"standard output could not be written: {error.cause.strerror}", 2)
    except OSError as error:
        parts = [str(part) for part in (error.filename, error.strerror) if part]
        return _fail(": ".join(parts) or str(error), 2)
    return 0


def continue_text(options: argparse.Namespace) -> None:
    """Print the prompt and what the model adds, piece by piece.

    Raises:
        BKCoreError: if the prompt, an option or the checkpoint is refused.
        OSError: if a file or standard input cannot be read.
    """
    prompt = _prompt(options.prompt)
    started = time.perf_counter()
    from bkcore_runtime.loading import load  # numpy and tokenizers take a tenth of a second
    from bkcore_runtime.tokenizer import check_text

    check_text(prompt)
    engine, tokenizer = load(options.folder, threads=options.threads)
    loaded = time.perf_counter()
    ids = tokenizer.encode(prompt)
    times: list[float] = []
    pieces = tokenizer.stream(_timed(_tokens(engine, ids, options), times), after=ids)
    _print(prompt)
    try:
        for piece in pieces:
            _print(piece)
        _print("\n")
    finally:
        if options.stats and times:
            _say(_statistics(engine, len(ids), started, loaded, times))


def _tokens(engine: Engine, ids: list[int], options: argparse.Namespace) -> Iterator[int]:
    return engine.generate(
        ids,
        options.max_new_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        min_p=options.min_p,
        repetition_penalty=options.repetition_penalty,
        seed=options.seed,
    )


def _timed(tokens: Iterator[int], times: list[float]) -> Iterator[int]:
    """Tokens, and in `times` when the call for the first began and when each came."""
    times.append(time.perf_counter())
    for token in tokens:
        times.append(time.perf_counter())
        yield token


def _statistics(
    engine: Engine, read: int, started: float, loaded: float, times: list[float]
) -> str:
    first, *came = times
    parts = [f"loaded in {loaded - started:.3f} s"]
    if came:
        parts.append(f"read {read} tokens in {came[0] - first:.4f} s")
    if len(came) > 1:
        took = came[-1] - came[0]
        parts.append(f"made {len(came) - 1} more in {took:.4f} s: {(len(came) - 1) / took:,.0f}/s")
    return "; ".join([*parts, f"{engine.isa}, threads: {engine.threads}"])


def _prompt(argument: str) -> str:
    """The text to continue: that of the option, or of standard input for "-"."""
    if argument != "-":
        try:
            return os.fsencode(argument).decode()  # whatever the locale made of it
        except UnicodeError:
            return argument
    if sys.stdin is None:
        raise InputError("standard input is closed, so it holds no prompt")
    content = sys.stdin.buffer.read()
    try:
        return content.decode().removesuffix("\n")
    except UnicodeError as error:
        raise InputError(f"the prompt on standard input is not valid UTF-8: {error}") from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bkcore-run",
        description="Continue a text with a checkpoint of bkcore, without PyTorch.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("folder", help="checkpoint folder")
    add = parser.add_argument
    add("--prompt", required=True, help="text to continue; - reads it from standard input")
    add("--max-new-tokens", type=int, default=60, metavar="N", help="tokens to add at most")
    add("--temperature", type=float, default=0.8, metavar="T", help="0 takes the likeliest")
    add("--top-k", type=int, default=50, metavar="K", help="likeliest tokens to keep; 0: all")
    add("--top-p", type=float, default=1.0, metavar="P", help="probability to keep; 1: all")
    add("--min-p", type=float, default=0.0, metavar="P", help="least share of the likeliest's")
    add("--repetition-penalty", type=float, default=1.0, metavar="F", help="1 is none")
    add("--seed", type=int, default=0, metavar="N", help="seed of the sampling")
    threads = "by default 1 for small models, or OMP_NUM_THREADS, or idle cores"
    add("--threads", type=int, metavar="N", help=threads)
    add("--stats", action="store_true", help="say on standard error how fast it was")
    add("--version", action="version", version=f"bkcore-run {__version__}")
    return parser


class _UnprintedError(Exception):
    """Standard output could not be written to."""

    def __init__(self, cause: OSError) -> None:
        super().__init__(cause)
        self.cause = cause


def _print(text: str) -> None:
    """Print text at once; characters that the encoding lacks become question marks."""
    try:
        if sys.stdout is None:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        encoding = sys.stdout.encoding
        sys.stdout.write(text.encode(encoding, "replace").decode(encoding))
        sys.stdout.flush()
    except OSError as error:
        raise _UnprintedError(error) from error


def _fail(sentence: str, code: int, before: str = "") -> int:
    _say(f"bkcore-run: {_CONTROL.sub(lambda found: ascii(found[0])[1:-1], sentence)}", before)
    return code


def _say(line: str, before: str = "") -> None:
    """Print a line on standard error, if that is possible."""
    if sys.stderr is not None:
        with suppress(OSError):
            print(f"{before}{line}", file=sys.stderr, flush=True)


def _drop_output() -> None:
    """Discard what standard output holds, which Python would write again at its end."""
    if sys.stdout is not None:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
