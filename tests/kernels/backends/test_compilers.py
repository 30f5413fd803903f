"""The kernels compile with Clang, and for aarch64, without a warning."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

SOURCES = Path(__file__).resolve().parents[3] / "csrc"
COMMON = ["-std=c++17", "-O1", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
WARNINGS = ["-Wall", "-Wextra", "-Werror", "-Wno-psabi"]
# As in CMakeLists.txt.
AVX2 = ["-mavx2", "-mfma"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl"]


@pytest.mark.parametrize(
    ("compiler", "package", "flags"),
    [
        ("clang++", "clang", ["--target=x86_64-linux-gnu"]),
        ("clang++", "clang", ["--target=x86_64-linux-gnu", *AVX2]),
        ("clang++", "clang", ["--target=x86_64-linux-gnu", *AVX512]),
        ("clang++", "clang", ["--target=x86_64-linux-gnu", *AVX512, "-mavx512vnni"]),
        # GCC does not see that a unit of work has at least one lane.
        (
            "aarch64-linux-gnu-g++",
            "g++-aarch64-linux-gnu",
            ["-Wno-maybe-uninitialized"],
        ),
        (
            "aarch64-linux-gnu-g++",
            "g++-aarch64-linux-gnu",
            ["-Wno-maybe-uninitialized", "-march=armv8.2-a+dotprod"],
        ),
    ],
)
@pytest.mark.parametrize("source", ["sweep", "product", "rounding"])
def test_compiles(compiler, package, flags, source, tmp_path):
    if shutil.which(compiler) is None:
        pytest.skip(f"{compiler} is not installed (Debian, Ubuntu: the package {package})")
    command = [compiler, *COMMON, *WARNINGS, *flags, "-DBKCORE_ISA=test"]
    files = ["-c", str(SOURCES / f"{source}_kernel.cpp"), "-o", str(tmp_path / "kernel.o")]
    result = subprocess.run([*command, *files], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("compiler", ["g++", "clang++"])
def test_the_flags_of_the_sanitizers_are_known(compiler):
    if shutil.which(compiler) is None:
        pytest.skip(f"{compiler} is not installed")
    found = re.search(r"set\(sanitize ([^)]*)\)", (SOURCES.parent / "CMakeLists.txt").read_text())
    assert found is not None
    command = [compiler, *COMMON, *WARNINGS, *found[1].split(), "-DBKCORE_ISA=test"]
    command += ["-fsyntax-only", str(SOURCES / "rounding_kernel.cpp")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
