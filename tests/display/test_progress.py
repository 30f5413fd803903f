"""What a plan of stages leaves in a log file."""

from __future__ import annotations

from io import StringIO

import pytest
from rich.console import Console

from bkcore.display import progress
from bkcore.display.progress import Plan


@pytest.mark.parametrize(("silence", "running"), [(0.0, 2), (1e9, 0)])
def test_a_running_stage_leaves_lines_without_a_terminal(monkeypatch, silence, running):
    monkeypatch.setattr(progress, "_SILENCE", silence)
    file = StringIO()
    with Plan({"train": 1.0}, Console(file=file)) as plan, plan.stage("train") as advance:
        advance(0.25)
        advance(0.5, "loss 3.2")
    *lines, last = filter(None, file.getvalue().splitlines())
    expected = ["[1/1] train: 25 % after 0 s", "[1/1] train: loss 3.2, 50 % after 0 s"]
    assert lines == expected[:running]
    assert last == "[1/1] train: loss 3.2, 0 s"


def test_a_terminal_shows_a_bar_instead(monkeypatch):
    monkeypatch.setattr(progress, "_SILENCE", 0.0)
    file = StringIO()
    console = Console(file=file, force_terminal=True)
    with Plan({"train": 1.0}, console) as plan, plan.stage("train") as advance:
        advance(0.25)
    assert "after" not in file.getvalue()
