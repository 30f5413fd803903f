"""Work in a fresh interpreter, which shares nothing with this one but files."""

from __future__ import annotations

import multiprocessing
import pickle
import signal
from collections.abc import Callable
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
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(sender, function, arguments), daemon=True)
    _start_uninterrupted(process)
    sender.close()
    try:
        while True:
            kind, value = pickle.loads(receiver.recv_bytes())
            if kind == "error":
                raise value
            if kind == "result":
                return value
            on_message(value)
    except EOFError:
        process.join()
        raise ProcessDiedError(process.exitcode) from None
    except BaseException:
        process.terminate()
        raise
    finally:
        receiver.close()
        process.join()


def _start_uninterrupted(process: Any) -> None:
    """Start a process that Ctrl-C does not reach: it would print what it was doing, and we say it.

    It inherits which signals are blocked here.
    """
    resource_tracker.ensure_running()  # a process, too, whose start would unblock the signal
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _work(sender: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    def send(kind: str, value: Any) -> None:
        # By value: torch would have Connection.send share tensors through a server in this
        # process, which ends before they are read.
        sender.send_bytes(pickle.dumps((kind, value)))

    signal.signal(signal.SIGTERM, _interrupt)
    try:
        send("result", function(lambda value: send("message", value), *arguments))
    except BKCoreError as error:
        send("error", error)
    except (KeyboardInterrupt, BrokenPipeError):
        pass  # the process that wanted it was interrupted, and says so


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt
