"""Files are checked piece by piece: to be interrupted, to survive changes, and in huge pages."""

from __future__ import annotations

import hashlib
import mmap
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

import pytest

from bkcore.model import LanguageModel
from bkcore_runtime import manifest
from bkcore_runtime.manifest import is_same, sha256

HUGE_PAGE = 2**21


@pytest.mark.parametrize("size", [0, 1, HUGE_PAGE - 1, HUGE_PAGE, 2 * HUGE_PAGE + 5])
def test_the_digest_is_that_of_the_content(tmp_path: Path, size: int) -> None:
    content = os.urandom(size)
    (tmp_path / "file").write_bytes(content)
    with open(tmp_path / "file", "rb") as file:
        assert sha256(file) == hashlib.sha256(content).hexdigest()


@pytest.mark.skipif(not Path("/proc/version").exists(), reason="/proc is of Linux")
def test_files_that_do_not_say_their_size_are_empty() -> None:
    """Some of them, such as /proc/kmsg, have no end."""
    with open("/proc/version", "rb") as file:
        assert sha256(file) == hashlib.sha256().hexdigest()


def test_a_file_that_changes_while_it_is_checked_is_another(
    large: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = manifest.sha256

    def slow(file: BinaryIO) -> str:
        digest = whole(file)
        with open(large / "model.safetensors", "ab") as same:
            same.write(b"more")
        return digest

    monkeypatch.setattr(manifest, "sha256", slow)
    path, status = manifest.check(large, "model.safetensors", manifest.read(large))
    assert not is_same(path, status)


def test_a_long_file_may_be_interrupted(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    os.truncate(tmp_path / "file", 8 * HUGE_PAGE)

    class Interrupted:
        """Ctrl-C while the second piece is read."""

        def __init__(self, file: IO[bytes]) -> None:
            self.file, self.fileno = file, file.fileno
            self.pieces = 0

        def read(self, size: int) -> bytes:
            self.pieces += 1
            if self.pieces == 2:
                os.kill(os.getpid(), signal.SIGINT)
            return self.file.read(size)

    with open(tmp_path / "file", "rb") as file:
        with pytest.raises(KeyboardInterrupt):
            sha256(cast(Any, Interrupted(file)))
        assert file.tell() <= 2 * HUGE_PAGE


SHORTENED = """
import mmap, os, sys
from pathlib import Path
from bkcore_runtime import CheckpointError, manifest
folder = Path(sys.argv[1])

class Mapping(mmap.mmap):
    def __new__(cls, *arguments, **options):
        made = super().__new__(cls, *arguments, **options)
        os.truncate(folder / "model.safetensors", 4096)
        return made

mmap.mmap = Mapping
try:
    manifest.check(folder, "model.safetensors", manifest.read(folder))
except CheckpointError as error:
    print(error)
"""


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """A checkpoint whose weights have some megabytes."""
    LanguageModel(2048, 256, 1, 512).save_pretrained(tmp_path / "large")
    assert (tmp_path / "large" / "model.safetensors").stat().st_size > 2 * HUGE_PAGE
    return tmp_path / "large"


def run(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, str(folder)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux maps a file to read it")
def test_a_file_that_is_shortened_meanwhile_was_altered(large: Path) -> None:
    done = run(SHORTENED, large)
    assert done.returncode == 0, done.stderr
    assert "model.safetensors was truncated or altered" in done.stdout


def huge_kilobytes(smaps: str, name: str) -> int:
    """How much of a mapped file is in huge pages."""
    mappings = re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", smaps)
    found = [re.search(r"FilePmdMapped: +(\d+)", each) for each in mappings if name in each]
    return sum(int(each[1]) for each in found if each)


def gives_huge_pages(path: Path) -> bool:
    """Whether the system keeps a file in huge pages, if it is asked early enough."""
    with open(path, "w+b") as file:
        file.write(bytes(4 * HUGE_PAGE))
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            content.madvise(mmap.MADV_HUGEPAGE)
            hashlib.sha256(content)
            return huge_kilobytes(Path("/proc/self/smaps").read_text(), str(path)) > 0


LOADED = """
import sys
from bkcore_runtime import Engine
engine = Engine(sys.argv[1])
list(engine.generate([1, 2, 3], 3, stop=()))
print(open("/proc/self/smaps").read())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="it reads /proc")
def test_a_saved_model_is_in_huge_pages(large: Path, tmp_path: Path) -> None:
    try:
        if not gives_huge_pages(tmp_path / "file"):
            pytest.skip("this file system has no huge pages")
    except (OSError, AttributeError):
        pytest.skip("this system has no huge pages")
    done = run(LOADED, large)
    assert done.returncode == 0, done.stderr
    assert huge_kilobytes(done.stdout, "model.safetensors") > 0


def test_a_file_that_is_gone_is_not_the_same(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"content")
    before = path.stat()
    assert is_same(path, before)
    path.unlink()
    assert not is_same(path, before)
