"""A command as a process: what it prints and writes, how it is interrupted, and how it ends."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import typer
from rich.text import Text
from typer.core import TyperCommand

from bkcore.display.console import Console, LastingStream, say, visible
from bkcore.errors import BenchmarkError, BKCoreError, OutputError
from bkcore.host import free_cores


class Command(TyperCommand):
    """A command during which transformers is quiet, and that says so when it is interrupted."""

    def invoke(self, ctx: Any) -> Any:
        try:
            with _quiet_transformers():
                return super().invoke(ctx)
        except KeyboardInterrupt as stop:
            _complain("; ".join(["interrupted", *map(str, stop.args)]))
            number = stop.number if isinstance(stop, _Terminated) else signal.SIGINT
            raise typer.Exit(128 + number) from None


class _Terminated(KeyboardInterrupt):
    """Another process asked this one to end."""

    number = signal.SIGTERM


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Without warnings and progress bars of transformers inside of a with block."""
    from transformers.utils import logging

    verbosity, had_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if had_bars:
            logging.enable_progress_bar()


def use_free_cores() -> None:
    """Compute with no more threads than cores are free, and say so if that takes some away.

    OMP_NUM_THREADS in the environment has its way.
    """
    import torch

    free = free_cores()
    if "OMP_NUM_THREADS" in os.environ or free >= torch.get_num_threads():
        return
    torch.set_num_threads(free)
    threads = "1 thread" if free == 1 else f"{free} threads"
    say(
        Console(stderr=True),
        f"other processes keep cores busy: computing with {threads} "
        "(the environment variable OMP_NUM_THREADS sets another number)",
    )


@contextmanager
def keeping(what: str) -> Iterator[None]:
    """Have an interruption inside of a with block say what is kept."""
    try:
        yield
    except KeyboardInterrupt as stop:
        stop.args = (what,)
        raise


def publish(show: Callable[[], None], *files: tuple[Path | None, Callable[[Path], None]]) -> None:
    """Write a result into the files that were asked for, then print it.

    Raises:
        OutputError: in the end, if something of it could not be written or printed.
    """
    failed = []
    try:
        for path, write in files:
            try:
                if path is not None:
                    write(path)
            except OutputError as error:
                failed.append(str(error))
    finally:
        show()
    if failed:
        raise OutputError("; ".join(failed))
    sys.stdout.flush()
    if getattr(sys.stdout, "error", None) is not None:
        raise _UnprintedError


class _UnprintedError(OutputError):
    """The terminal, file or pipe that was printed to took no more; `main` says so."""


def run(command: Callable[[], object]) -> int:
    """Run a command in this process, with streams that end no work and a handler of SIGTERM.

    Returns:
        The exit code, as `bkcore.cli.main` describes it.
    """
    _reserve_descriptors()
    out, err = LastingStream(sys.stdout), LastingStream(sys.stderr)
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        with redirect_stdout(out), redirect_stderr(err):
            code = _exit_code(command)
            out.flush()
            if isinstance(out.error, BrokenPipeError):
                code = code or 128 + signal.SIGPIPE
            elif out.error is not None:
                _complain(f"standard output took no more: {out.error.strerror}")
                code = code or 2
    finally:
        signal.signal(signal.SIGTERM, before)
    return code


def _exit_code(command: Callable[[], object]) -> int:
    """Run a command, and say what went wrong."""
    try:
        command()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0
    except _UnprintedError:
        return 0
    except BKCoreError as error:
        _complain(str(error))
        return 1 if isinstance(error, BenchmarkError) else 2
    except OSError as error:
        parts = [str(part) for part in (error.filename, error.strerror) if part]
        _complain(": ".join(parts) or str(error))
        return 2
    return 0


def _complain(sentence: str) -> None:
    Console(stderr=True).print(Text.assemble(("bkcore:", "bold red"), f" {visible(sentence)}"))


def _terminate(number: int, frame: object) -> None:
    raise _Terminated


def _reserve_descriptors() -> None:
    """Have something behind standard streams that are closed: a file would take their place."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDONLY)
