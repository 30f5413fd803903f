"""Runs finish once, belong to one setting, and are not done by two processes at a time."""

from __future__ import annotations

import fcntl
import json
from pathlib import Path
from typing import Any

import pytest

from bkcore.comparison.runs import Advance, Run, StepTimes, finished
from bkcore.errors import InputError


def ignore(fraction: float) -> None:
    del fraction


class Work:
    """Counts how often it is done."""

    def __init__(self) -> None:
        self.times = 0

    def __call__(self, folder: Path, advance: Advance) -> dict[str, Any]:
        self.times += 1
        advance(1.0)
        return {"row": {"folder": folder.name}}


def run(work: Work, **settings: Any) -> Run:
    return Run("group/model/seed0", lambda: settings, work, 1.0)


def test_a_finished_run_is_not_done_again(tmp_path: Path) -> None:
    work = Work()
    assert run(work, steps=3).finish(tmp_path, ignore)
    assert run(work, steps=3).finish(tmp_path, ignore)
    assert work.times == 1
    assert finished(tmp_path, "group") == [{"row": {"folder": "seed0"}}]
    assert finished(tmp_path, "other") == []


def test_an_interrupted_run_is_done_again(tmp_path: Path) -> None:
    def interrupted(folder: Path, advance: Advance) -> dict[str, Any]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Run("group/model/seed0", dict, interrupted, 1.0).finish(tmp_path, ignore)
    assert finished(tmp_path, "group") == []
    work = Work()
    assert run(work).finish(tmp_path, ignore)
    assert work.times == 1


def test_other_settings_are_refused(tmp_path: Path) -> None:
    work = Work()
    run(work, steps=3, width=8).finish(tmp_path, ignore)
    run(work, steps=3, width=8).check(tmp_path)
    with pytest.raises(InputError, match=r"steps 3, now 4; name another --output"):
        run(work, steps=4, width=8).check(tmp_path)
    with pytest.raises(InputError, match=r"layers None, now 2"):
        run(work, steps=3, width=8, layers=2).check(tmp_path)


def test_a_run_of_another_process_is_left_alone(tmp_path: Path) -> None:
    work = Work()
    folder = tmp_path / "group/model/seed0"
    folder.mkdir(parents=True)
    with (folder / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert not run(work).finish(tmp_path, ignore)
    assert work.times == 0
    assert run(work).finish(tmp_path, ignore)


def test_step_times_survive_an_interruption(tmp_path: Path) -> None:
    path = tmp_path / "steps.txt"
    path.write_text("1 10.0\n2 1.0\n3 2.0\n3 1.5\n4")  # step 3 twice, step 4 cut short
    found = StepTimes(path).seconds()
    assert found == {"seconds": 12.5, "seconds_per_step": 1.5}
    times = StepTimes(path)
    times(4)
    assert StepTimes(path).seconds()["seconds"] == pytest.approx(12.5, abs=1)
    assert json.dumps(found)
