"""Work in a fresh interpreter, which shares nothing with this one but files."""

from __future__ import annotations

import multiprocessing
import pickle
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from typing import Any

from bkcore.errors import BKCoreError


class ProcessDiedError(RuntimeError):
    """The other process ended without a result, with the exit code `exit_code`."""

    def __init__(self, exit_code: int | None) -> None:
        super().__init__(f"the process ended with exit code {exit_code}")
        self.exit_code = exit_code


def call_in_new_process(
    function: Callable[..., Any],
    *arguments: Any,
    on_message: Callable[[Any], None] = lambda message: None,
) -> Any:
    """Call `function(send, *arguments)` in a fresh interpreter; what it sends is passed on here.

    An interruption of this process ends the other one, which may clean up, but prints nothing.

    Args:
        function: of a module; it and its arguments can be pickled, and so can its result.
        on_message: called here with what the function gives to `send`.

    Raises:
        BKCoreError: what the function raised.
        ProcessDiedError: if the process died.
    """
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_work, args=(there,), daemon=True)
    _start_uninterrupted(process)
    there.close()
    try:
        # Not with the start, which would wait until the interpreter is there to read it.
        with suppress(ConnectionError):  # it died, which the next line says
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
    """Start a process that Ctrl-C does not reach: it would print what it was doing, and we say it.

    It inherits which signals are blocked here. Nothing may end this process halfway, either: the
    other one would miss what it is to read, and print that.
    """
    resource_tracker.ensure_running()  # a process, too, whose start would unblock the signal
    with _deferred(signal.SIGINT, signal.SIGTERM):
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _deferred(*numbers: signal.Signals) -> Iterator[None]:
    """Have signals wait for the end of a with block.

    Blocking them would not do: another thread takes a signal that this one blocks, and Python runs
    its handler here nevertheless.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # handlers run in the main thread only
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
        # By value: torch would have Connection.send share tensors through a server in this
        # process, which ends before they are read.
        connection.send_bytes(pickle.dumps((kind, value)))

    signal.signal(signal.SIGTERM, _interrupt)
    try:
        function, arguments = pickle.loads(connection.recv_bytes())
        send("result", function(lambda value: send("message", value), *arguments))
    except BKCoreError as error:
        send("error", error)
    except (KeyboardInterrupt, EOFError, ConnectionError):
        pass  # the process that wanted it was interrupted, and says so


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt
