"""Work in a process of its own: its result, its messages, its errors, its end."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from bkcore.errors import InputError
from bkcore.processes import ProcessDiedError, call_in_new_process

# What is called is found by its name in a fresh interpreter, which does not know this file.
WORK = """
import os, signal, time, torch
from bkcore.errors import InputError

def add(send, a, b):
    send("adding")
    return a + b, os.getpid()

def refuse(send):
    raise InputError("no")

def die(send):
    os._exit(7)

def wait(send, path):
    try:
        send("waiting")
        time.sleep(60)
    finally:
        open(path, "w").write("saved")
"""


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> object:
    import importlib
    import sys

    folder = tmp_path_factory.mktemp("modules")
    (folder / "bkcore_test_work.py").write_text(WORK)
    sys.path.insert(0, str(folder))  # which a spawned process gets, too
    yield importlib.import_module("bkcore_test_work")
    sys.path.remove(str(folder))


def test_a_result_comes_back_after_its_messages(work) -> None:
    messages: list[str] = []
    found, number = call_in_new_process(work.add, "x" * 1_000_000, "y", on_message=messages.append)
    assert found == "x" * 1_000_000 + "y"
    assert number != os.getpid()
    assert messages == ["adding"]


def test_an_error_and_a_death_are_told(work) -> None:
    with pytest.raises(InputError, match="no"):
        call_in_new_process(work.refuse)
    with pytest.raises(ProcessDiedError, match="exit code 7") as death:
        call_in_new_process(work.die)
    assert death.value.exit_code == 7


def is_importing(number: int | None) -> bool:
    """Whether a process has begun to load PyTorch, which takes a second or more."""
    return "libtorch" in Path(f"/proc/{number}/maps").read_text()


def interrupt(number: int | None) -> None:
    assert number is not None
    os.kill(number, signal.SIGINT)


@pytest.mark.parametrize("when", ["early", "late"])
def test_an_interruption_ends_the_other_process_in_silence(
    work, when: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Early it is still importing; late it is at work, and cleans up. Ctrl-C is for both."""
    own = os.getpid()

    def while_it_imports() -> None:
        while not any(is_importing(each.pid) for each in multiprocessing.active_children()):
            time.sleep(0.01)
        for each in multiprocessing.active_children():
            interrupt(each.pid)
        if when == "early":
            interrupt(own)

    start = time.monotonic()
    thread = threading.Thread(target=while_it_imports)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        call_in_new_process(
            work.wait, str(tmp_path / "file"), on_message=lambda message: interrupt(own)
        )
    thread.join()
    assert time.monotonic() - start < 50
    assert (tmp_path / "file").exists() is (when == "late")
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_waits_until_a_process_has_started(work, number, monkeypatch, capfd) -> None:
    """Another thread may take it, so that blocking it in this one would not do."""
    process = multiprocessing.get_context("spawn").Process
    start, began, starting, sent = process.start, [], threading.Event(), threading.Event()

    def send() -> None:
        starting.wait()
        os.kill(os.getpid(), number)
        sent.set()

    other = threading.Thread(target=send)  # before anything is blocked, which it would inherit
    other.start()

    def slow_start(self) -> None:
        starting.set()
        sent.wait()
        time.sleep(0.2)  # a handler would run here
        start(self)
        began.append(self.pid)

    class Stopped(BaseException):
        pass

    def stop(got, frame) -> None:
        raise Stopped

    before = signal.signal(number, stop)
    monkeypatch.setattr(process, "start", slow_start)
    try:
        with pytest.raises(Stopped):
            call_in_new_process(work.add, 1, 2)
    finally:
        signal.signal(number, before)
        other.join()
    assert began
    assert capfd.readouterr().err == ""


LEAVING = """
import atexit, sys, torch.distributed as dist
from bkcore.processes import leave
atexit.register(print, "the interpreter ends")
if len(sys.argv) > 1:
    dist.init_process_group("gloo", init_method="file://" + sys.argv[1], rank=0, world_size=1)
sys.stdout.write("done. ")
leave(3)
"""


@pytest.mark.parametrize("group", [False, True])
def test_only_in_a_group_a_process_leaves_at_once(group: bool, tmp_path: Path) -> None:
    arguments = [str(tmp_path / "store")] if group else []
    done = subprocess.run(
        [sys.executable, "-c", LEAVING, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 3, done.stderr
    assert done.stdout == ("done. " if group else "done. the interpreter ends\n")


LEAVING_WITHOUT = """
import atexit, pathlib, sys, torch.distributed as dist
from bkcore.processes import leave
atexit.register(pathlib.Path("ended").touch)
dist.init_process_group("gloo", init_method="file://" + sys.argv[1], rank=0, world_size=1)
print("done. ", end="")
leave(3)
"""


@pytest.mark.parametrize("streams", [">&-", ">&- 2>&-", "> /dev/full", "2>&-", "| exit"])
def test_a_process_of_a_group_leaves_whatever_its_streams_are(streams: str, tmp_path: Path) -> None:
    (tmp_path / "code.py").write_text(LEAVING_WITHOUT)
    line = f"set -o pipefail; {sys.executable} code.py {tmp_path / 'store'} {streams}"
    buffered = {**os.environ, "PYTHONUNBUFFERED": ""}
    options: dict[str, Any] = {"cwd": tmp_path, "env": buffered, "capture_output": True}
    done = subprocess.run(["bash", "-c", line], text=True, check=False, **options)
    assert done.returncode == 3, done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "ended").exists()
