"""`bkcore-run` as a process sees it: text as it is made, exit codes, and streams that end."""

from __future__ import annotations

import io
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from bkcore_runtime import __version__, command, load
from tests.runtime.alone import GREEDY, PROMPT
from tests.runtime.conftest import SHIPPED

RUN = [sys.executable, "-m", "bkcore_runtime"]


def run(*arguments: str) -> int:
    return command.run(list(map(str, arguments)))


def test_the_greedy_text_is_that_of_the_model() -> None:
    from bkcore.commands.generate import sample
    from bkcore.evaluation.checkpoints import load_checkpoint

    assert sample(*load_checkpoint(SHIPPED), PROMPT, 60) == GREEDY


def test_it_prints_the_prompt_and_what_follows(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(str(SHIPPED), "--prompt", PROMPT, "--temperature", "0") == 0
    printed = capsys.readouterr()
    assert printed.out == GREEDY + "\n"
    assert printed.err == ""


def test_options_reach_the_engine(capsys: pytest.CaptureFixture[str]) -> None:
    engine, tokenizer = load(SHIPPED)
    ids = tokenizer.encode(PROMPT)
    options: dict[str, Any] = {"temperature": 1.5, "top_k": 40, "top_p": 0.9, "min_p": 0.02}
    tokens = list(engine.generate(ids, 20, **options, repetition_penalty=1.2, seed=7))
    arguments = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    more = ["--repetition-penalty=1.2", "--seed=7", "--max-new-tokens=20", "--threads=2", "--stats"]
    assert run(str(SHIPPED), f"--prompt={PROMPT}", *arguments, *more) == 0
    printed = capsys.readouterr()
    assert printed.out == tokenizer.decode(ids + tokens) + "\n"
    assert "made 19 more in" in printed.err
    assert "threads: 2" in printed.err


def test_the_prompt_may_come_from_standard_input(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = io.TextIOWrapper(io.BytesIO(f"{PROMPT}\n".encode()), "ascii")
    monkeypatch.setattr(sys, "stdin", given)
    assert run(str(SHIPPED), "--prompt", "-", "--temperature=0") == 0
    assert capsys.readouterr().out == GREEDY + "\n"


def test_waiting_for_the_prompt_is_no_loading(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = time.perf_counter
    waited = 0.0

    class Slow(io.BytesIO):
        def read(self, *arguments: Any) -> bytes:
            nonlocal waited
            waited = 10_000.0
            return super().read(*arguments)

    monkeypatch.setattr(time, "perf_counter", lambda: clock() + waited)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(Slow(PROMPT.encode())))
    assert run(str(SHIPPED), "--prompt", "-", "--max-new-tokens=2", "--stats") == 0
    found = re.match(r"loaded in ([\d.]+) s; ", capsys.readouterr().err)
    assert found is not None
    assert float(found[1]) < 5_000


def test_text_appears_as_it_is_made(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from bkcore_runtime import Engine

    generate = Engine.generate
    seen: list[str] = []

    def watched(*arguments, **options):
        for token in generate(*arguments, **options):
            seen.append(capsys.readouterr().out)
            yield token

    monkeypatch.setattr(Engine, "generate", watched)
    assert run(str(SHIPPED), f"--prompt={PROMPT}", "--temperature=0", "--max-new-tokens=6") == 0
    assert seen == [PROMPT, " the", " area", " .", " The", " r"]


# ---- what is refused ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["nothing", "--prompt=x"], "bkcore-run: there is no checkpoint folder"),
        ([str(SHIPPED), "--prompt="], "bkcore-run: the prompt is empty"),
        ([str(SHIPPED), "--prompt=\udcff"], "is not valid UTF-8 text"),
        ([str(SHIPPED), "--prompt=x", "--temperature=-1"], "temperature must be a number of at"),
        ([str(SHIPPED), "--prompt=x", "--top-p=2"], "top_p must be from 0 to 1"),
        ([str(SHIPPED), "--prompt=x", "--threads=0"], "threads must be from 1 to 1024"),
        ([str(SHIPPED), "--prompt=x", "--max-new-tokens=0"], "max_new_tokens must be at least 1"),
        (["a\x1b[31m", "--prompt=x"], r"a\x1b[31m"),
    ],
)
def test_mistakes_are_a_sentence(
    capsys: pytest.CaptureFixture[str], arguments: list[str], complaint: str
) -> None:
    assert run(*arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert complaint in printed.err
    assert len(printed.err.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "the following arguments are required"),
        (["x"], "required: --prompt"),
        (["x", "--prompt=x", "--seed=a"], "invalid int value"),
        (["x", "--prompt=x", "--temp=1"], "unrecognized arguments"),
    ],
)
def test_options_that_are_none(
    capsys: pytest.CaptureFixture[str], arguments: list[str], complaint: str
) -> None:
    with pytest.raises(SystemExit) as end:
        run(*arguments)
    assert end.value.code == 2
    assert complaint in capsys.readouterr().err


def test_it_helps_and_has_a_version(capsys: pytest.CaptureFixture[str]) -> None:
    for option, text in (("--help", "--repetition-penalty"), ("--version", __version__)):
        with pytest.raises(SystemExit) as end:
            run(option)
        assert end.value.code == 0
        assert text in capsys.readouterr().out


@pytest.mark.parametrize("given", [None, b"\xff", b""])
def test_standard_input_that_holds_no_prompt(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, given: bytes | None
) -> None:
    stream = None if given is None else io.TextIOWrapper(io.BytesIO(given))
    monkeypatch.setattr(sys, "stdin", stream)
    assert run(str(SHIPPED), "--prompt", "-") == 2
    assert "prompt" in capsys.readouterr().err


# ---- streams and signals --------------------------------------------------------------------


def process(arguments: str, **options) -> subprocess.CompletedProcess[str]:
    line = " ".join([*RUN, str(SHIPPED), arguments])
    return subprocess.run(line, shell=True, capture_output=True, text=True, check=False, **options)


def test_a_closed_pipe_ends_in_silence() -> None:
    line = f"{' '.join(RUN)} {SHIPPED} --prompt x --max-new-tokens 100000"
    script = f"set -o pipefail; {line} | head -c 20"
    done = subprocess.run(
        ["bash", "-c", script], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 128 + signal.SIGPIPE
    assert done.stderr == ""


def test_outputs_that_cannot_be_written() -> None:
    full = process("--prompt x > /dev/full")
    assert full.returncode == 2
    complaint = "bkcore-run: standard output could not be written: "
    assert full.stderr == f"{complaint}No space left on device\n"
    closed = process("--prompt x >&-")
    assert (closed.returncode, closed.stderr) == (2, f"{complaint}Bad file descriptor\n")
    assert process("--prompt x 2>&- <&-").returncode == 0


def test_an_output_of_ascii_gets_what_it_can() -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = process("--prompt 'Zoë –' --max-new-tokens 1", env=environment)
    assert done.returncode == 0
    assert done.stdout.startswith("Zo? ?")


def test_an_interruption_ends_it() -> None:
    line = [*RUN, str(SHIPPED), "--prompt", PROMPT, "--max-new-tokens", "10000000"]
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as running:
        assert running.stdout is not None
        running.stdout.read(200)
        running.send_signal(signal.SIGINT)
        _, complaint = running.communicate(timeout=60)
    assert running.returncode == 130
    assert complaint == b"\nbkcore-run: interrupted\n"


def test_the_command_is_installed_under_its_name() -> None:
    from importlib.metadata import entry_points

    (own,) = entry_points(group="console_scripts", name="bkcore-run")
    assert own.load() is command.main
    assert Path(sys.executable).with_name("bkcore-run").exists()
