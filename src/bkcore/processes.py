"""Work in a fresh interpreter, which shares only files with this one; and a process's end."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from typing import Any, NoReturn

from bkcore.errors import BKCoreError


class ProcessDiedError(RuntimeError):
    """The other process ended with exit code `exit_code` and without a result."""

    def __init__(self, exit_code: int | None) -> None:
        super().__init__(f"the process ended without a result, with exit code {exit_code}")
        self.exit_code = exit_code


def call_in_new_process(
    function: Callable[..., Any],
    *arguments: Any,
    on_message: Callable[[Any], None] = lambda message: None,
) -> Any:
    """Call `function(send, *arguments)` in a fresh interpreter, and return its result.

    Interrupting this process also ends the other one, which may clean up but prints nothing.

    Args:
        function: defined at the top level of a module. It, its arguments and its result must be
            picklable.
        arguments: passed to the function after `send`.
        on_message: called in this process with everything the function passes to `send`.

    Raises:
        BKCoreError: whatever the function raised.
        ProcessDiedError: if the process died.
    """
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_work, args=(there,), daemon=True)
    _start_uninterrupted(process)
    there.close()
    try:
        # Not passed at start, which would block until the new interpreter reads it.
        with suppress(ConnectionError):  # it died; `_receive` reports that
            here.send_bytes(pickle.dumps((function, arguments)))
        while True:
            kind, value = _receive(here, process)
            if kind == "error":
                raise value
            if kind == "result":
                return value
            on_message(value)
    except BaseException:
        process.terminate()
        raise
    finally:
        here.close()
        process.join()


def _receive(connection: Any, process: Any) -> Any:
    try:
        return pickle.loads(connection.recv_bytes())
    except (EOFError, ConnectionError):
        process.join()
        raise ProcessDiedError(process.exitcode) from None


def _start_uninterrupted(process: Any) -> None:
    """Start a process that Ctrl-C does not reach: this process reports the interruption alone.

    The new process inherits the blocked signals. Signals to this process wait until the start is
    complete: otherwise the new process would miss part of what it has to read, and print a
    traceback.
    """
    resource_tracker.ensure_running()  # starting this process later would unblock the signal
    with _deferred(signal.SIGINT, signal.SIGTERM):
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _deferred(*numbers: signal.Signals) -> Iterator[None]:
    """Defer signals until the end of a with block.

    Blocking them is not enough: another thread may receive a signal that this one blocks, and
    Python still runs its handler here, in the main thread.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # handlers run only in the main thread
        return
    arrived: list[int] = []
    before = {number: signal.getsignal(number) for number in numbers}
    for number in numbers:
        signal.signal(number, lambda got, frame: arrived.append(got))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        for got in arrived:
            signal.raise_signal(got)


def _work(connection: Connection) -> None:
    def send(kind: str, value: Any) -> None:
        # Pickled by value: with torch, Connection.send shares tensors through a server in this
        # process, which ends before they are read.
        connection.send_bytes(pickle.dumps((kind, value)))

    signal.signal(signal.SIGTERM, _interrupt)
    try:
        function, arguments = pickle.loads(connection.recv_bytes())
        send("result", function(lambda value: send("message", value), *arguments))
    except BKCoreError as error:
        send("error", error)
    except (KeyboardInterrupt, EOFError, ConnectionError):
        pass  # the parent was interrupted, and reports that itself


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def leave(exit_code: int) -> NoReturn:
    """End this process, as `sys.exit` does; in a process group of PyTorch, at once.

    A thread of PyTorch's gloo may still be letting go of a tensor when all results are there. It
    needs the interpreter's lock for that, and asking an interpreter that is ending for its lock
    aborts the process (https://github.com/pytorch/pytorch/issues/190489). So in a group the
    interpreter does not end: output is flushed as far as it can be, and what `atexit` registered is
    not called.

    Args:
        exit_code: 0 to 255.
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        sys.exit(exit_code)
    try:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:  # None was closed before the start
                with suppress(OSError, ValueError):  # nobody reads it, or it is closed
                    stream.flush()
    finally:
        os._exit(exit_code)
