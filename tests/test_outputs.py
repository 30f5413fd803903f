"""Outputs are tried before the work, written through what is no file, else whole or not at all."""

from __future__ import annotations

import ast
import json
import math
import os
import resource
import socket
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from bkcore.errors import InputError, OutputError
from bkcore.outputs import (
    is_special,
    prepare_file,
    prepare_folder,
    to_json,
    write_bytes,
    write_json,
    write_text,
)

SOURCE = Path(__file__).parents[1] / "src"


def left(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


# ---- what is no regular file ----------------------------------------------------------------


@pytest.mark.parametrize("name", ["/dev/null", "/dev/full", "/dev/stdout", "/dev/fd/1"])
def test_devices_are_written_through_and_stay(name: str) -> None:
    before = os.stat(name).st_mode
    prepare_file(Path(name))
    assert is_special(Path(name))
    if name == "/dev/full":
        with pytest.raises(OutputError, match="/dev/full could not be written: No space left"):
            write_text("x", Path(name))
    else:
        write_text("", Path(name))
    assert os.stat(name).st_mode == before


def test_an_open_file_is_written_where_it_stands(tmp_path: Path) -> None:
    """As /dev/stdout, and what a shell's >(command) names: opened anew, it would be cut off."""
    with (tmp_path / "log").open("w+") as file:
        file.write("before ")
        file.flush()
        link = tmp_path / "link"
        link.symlink_to(f"/proc/self/fd/{file.fileno()}")
        for path in (Path(f"/dev/fd/{file.fileno()}"), link):
            prepare_file(path)
            write_text("x", path)
        assert (tmp_path / "log").read_text() == "before xx"
    assert link.is_symlink()


@pytest.mark.parametrize("mode", [os.O_RDONLY, None])
def test_an_open_file_that_takes_nothing_is_refused(tmp_path: Path, mode: int | None) -> None:
    (tmp_path / "file").touch()
    number = os.open(tmp_path / "file", mode or 0)
    if mode is None:
        os.close(number)
    try:
        with pytest.raises(InputError, match=r"cannot be written \(Bad file descriptor\)"):
            prepare_file(Path(f"/dev/fd/{number}"))
    finally:
        if mode is not None:
            os.close(number)


def test_a_pipe_with_a_name_is_written_through(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    prepare_file(pipe)
    found: list[str] = []
    reader = threading.Thread(target=lambda: found.append(pipe.read_text()))
    reader.start()
    write_text("through", pipe)
    reader.join()
    assert found == ["through"]
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    assert left(tmp_path) == {"pipe"}


def test_a_socket_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # names of sockets are short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket")
        with pytest.raises(InputError, match="is a socket"):
            prepare_file(Path("socket"))


# ---- links ----------------------------------------------------------------------------------


@pytest.mark.parametrize("there", [True, False])
def test_a_link_stays_and_its_target_is_written(tmp_path: Path, there: bool) -> None:
    (tmp_path / "folder").mkdir()
    target = tmp_path / "folder" / "target"
    if there:
        target.write_text("old")
    link, second = tmp_path / "link", tmp_path / "second"
    link.symlink_to("folder/target")
    second.symlink_to("link")
    prepare_file(second)
    assert target.exists() is there
    write_text("new", second)
    assert target.read_text() == "new"
    assert link.is_symlink()
    assert second.is_symlink()
    assert left(tmp_path) == {"folder", "folder/target", "link", "second"}


def test_a_circle_of_links_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(InputError, match="symbolic links"):
        prepare_file(tmp_path / "a")


# ---- regular files --------------------------------------------------------------------------


def test_trying_leaves_everything_as_it_is(tmp_path: Path) -> None:
    old = tmp_path / "old"
    old.write_text("old")
    before = old.stat()
    prepare_file(old)
    prepare_file(tmp_path / "new")
    prepare_file(tmp_path / "some" / "new" / "folder" / "file")
    prepare_folder(tmp_path)
    prepare_folder(tmp_path / "other" / "folder")
    assert left(tmp_path) == {"old"}
    assert old.stat() == before


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("folder", "is a folder; name a file in it"),
        ("file/new", "file cannot be used as a folder to write in .File exists"),
        ("file/more/new", "more cannot be used as a folder to write in .Not a directory"),
        ("n" * 300, "File name too long"),
        ("not/there/" + "n" * 300, "File name too long"),
        ("n" * 300 + "/file", "File name too long"),
        ("nul\0", "null byte"),
    ],
)
def test_what_cannot_be_written_is_refused(tmp_path: Path, name: str, complaint: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=complaint):
        prepare_file(tmp_path / name)
    assert left(tmp_path) == {"folder", "file"}
    with pytest.raises(OutputError, match="could not be written"):
        write_text("x", tmp_path / name)


def test_a_name_as_long_as_names_may_be_is_written(tmp_path: Path) -> None:
    path = tmp_path / ("n" * 255)
    prepare_file(path)
    write_text("x", path)
    assert path.read_text() == "x"


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is forbidden to root")
def test_what_is_protected_is_refused(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.touch(mode=0o400)
    with pytest.raises(InputError, match="Permission denied"):
        prepare_file(kept)
    tmp_path.chmod(0o500)
    try:
        for path in (tmp_path / "new", tmp_path / "folder" / "new"):
            with pytest.raises(InputError, match="Permission denied"):
                prepare_file(path)
        with pytest.raises(InputError, match="Permission denied"):
            prepare_folder(tmp_path)
    finally:
        tmp_path.chmod(0o700)


def test_a_place_that_takes_no_files_is_refused() -> None:
    """Whoever asks."""
    with pytest.raises(InputError, match="/proc cannot be used as a folder to write in"):
        prepare_file(Path("/proc/report.json"))
    with pytest.raises(InputError, match="/proc/folder cannot be used as a folder to write in"):
        prepare_folder(Path("/proc/folder"))


def test_the_mode_of_an_old_file_is_kept_and_a_new_one_has_the_usual(tmp_path: Path) -> None:
    old, new, usual = tmp_path / "old", tmp_path / "new", tmp_path / "usual"
    old.write_text("old")
    old.chmod(0o604)
    usual.write_text("")
    for path in (old, new):
        write_text("new", path)
        assert path.read_text() == "new"
    assert stat.S_IMODE(old.stat().st_mode) == 0o604
    assert new.stat().st_mode == usual.stat().st_mode


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_the_owner_of_an_old_file_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.touch()
    os.chown(path, 1234, 4321)
    write_text("new", path)
    assert (path.stat().st_uid, path.stat().st_gid) == (1234, 4321)


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file may be longer than 1,000 bytes, as if the disk were full then."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.usefixtures("small_files")
def test_a_full_disk_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(OutputError, match="file could not be written: File too large"):
        write_bytes(b"x" * 5000, path)
    assert path.read_text() == "old"
    assert left(tmp_path) == {"file"}


# ---- JSON -----------------------------------------------------------------------------------


def test_json_has_null_and_a_reason_where_it_has_no_number(tmp_path: Path) -> None:
    report = {
        "rows": [{"ppl": math.inf, "fine": 0.5}, {"ppl": 2.0}],
        "low": -math.inf,
        "mean": math.nan,
        "mean_reason": "one window",
        "list": [1.0, [math.nan]],
        "flags": [True, None, 3, "text"],
    }
    write_json(report, tmp_path / "report.json")

    def refuse(name: str) -> None:
        pytest.fail(f"{name} is no JSON")

    found = json.loads((tmp_path / "report.json").read_text(), parse_constant=refuse)
    infinite = "infinite, or beyond what a float64 can hold"
    assert found == {
        "rows": [{"ppl": None, "ppl_reason": infinite, "fine": 0.5}, {"ppl": 2.0}],
        "low": None,
        "low_reason": infinite,
        "mean": None,
        "mean_reason": "one window",
        "list": [1.0, [None]],
        "list_reason": "not a number",
        "flags": [True, None, 3, "text"],
    }
    assert report["low"] == -math.inf  # the report itself stays


def test_json_is_ascii_whatever_a_name_holds() -> None:
    text = to_json({"name": "\udcff ± 漢"})
    assert text.isascii()
    assert json.loads(text) == {"name": "\udcff ± 漢"}


# ---- the whole source -----------------------------------------------------------------------


def calls() -> Iterator[tuple[str, ast.Call, str]]:
    """Every call in the source: where it stands, itself, and the name of what is called."""
    for path in sorted(SOURCE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                name = getattr(node.func, "attr", getattr(node.func, "id", ""))
                yield f"{path.relative_to(SOURCE)}:{node.lineno}", node, name


def keywords(call: ast.Call) -> dict[str | None, ast.expr]:
    return {keyword.arg: keyword.value for keyword in call.keywords}


def test_all_text_is_read_and_written_in_utf_8() -> None:
    missing = []
    for place, call, name in calls():
        if name in ("read_text", "write_text"):
            is_ours = isinstance(call.func, ast.Name)  # bkcore.outputs.write_text
            if not is_ours and "encoding" not in keywords(call):
                missing.append(place)
        elif name == "open" and ast.unparse(call.func) != "os.open":
            modes = [ast.unparse(each) for each in (*call.args, *keywords(call).values())]
            is_binary = any("b" in mode for mode in modes if mode.startswith("'"))
            if not is_binary and "encoding" not in keywords(call):
                missing.append(place)
    assert not missing


def test_no_json_is_written_with_infinities() -> None:
    missing = [
        place
        for place, call, name in calls()
        if name in ("dump", "dumps")
        and ast.unparse(call.func).startswith("json.")
        and "allow_nan" not in keywords(call)
    ]
    assert not missing
