"""Running a command as a process: its output, interruptions and exit code."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from typing import Any

import typer
from rich.text import Text
from typer.core import TyperCommand

from bkcore.display.console import Console, LastingStream, say, visible
from bkcore.errors import BenchmarkError, BKCoreError, OutputError
from bkcore.host import free_cores

_at_end = ExitStack()
"""What the running command must undo when it ends."""


class Command(TyperCommand):
    """A command that reports an interruption, and undoes at its end what `start_work` did."""

    def invoke(self, ctx: Any) -> Any:
        try:
            with _at_end:
                return super().invoke(ctx)
        except KeyboardInterrupt as stop:
            _complain("; ".join(["interrupted", *map(str, stop.args)]))
            number = stop.number if isinstance(stop, _Terminated) else signal.SIGINT
            raise typer.Exit(128 + number) from None


class _Terminated(KeyboardInterrupt):
    """Another process asked this one to terminate (SIGTERM)."""

    number = signal.SIGTERM


def start_work() -> None:
    """Import transformers, and silence it until the command ends.

    That takes seconds, so a command first checks everything that it can check without.
    """
    _at_end.enter_context(_quiet_transformers())


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Silence the warnings and progress bars of transformers inside a with block."""
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
    """Use no more threads than there are free cores, and say so if that means fewer threads.

    OMP_NUM_THREADS in the environment takes precedence.
    """
    import torch

    free = free_cores()
    if "OMP_NUM_THREADS" in os.environ or free >= torch.get_num_threads():
        return
    torch.set_num_threads(free)
    threads = "1 thread" if free == 1 else f"{free} threads"
    say(
        Console(stderr=True),
        f"other processes keep cores busy; computing with {threads} "
        "(set the environment variable OMP_NUM_THREADS to use another number)",
    )


@contextmanager
def keeping(what: str) -> Iterator[None]:
    """Make an interruption inside a with block say what is kept."""
    try:
        yield
    except KeyboardInterrupt as stop:
        stop.args = (what,)
        raise


class UnprintedError(OutputError):
    """Standard output could not be written to; `run` reports it."""


def run(command: Callable[[], object]) -> int:
    """Run a command in this process, with a SIGTERM handler and streams whose errors end no work.

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
                _complain(f"standard output could not be written: {out.error.strerror}")
                code = code or 2
    finally:
        signal.signal(signal.SIGTERM, before)
    return code


def _exit_code(command: Callable[[], object]) -> int:
    """Run a command, and report its error."""
    try:
        command()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0
    except UnprintedError:
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
    """Open /dev/null for closed standard streams; otherwise a file would get their descriptors."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDONLY)
