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
DOTPROD = ["-march=armv8.2-a+dotprod"]
GCC = "aarch64-linux-gnu-g++"
# GCC does not see that a unit of work has at least one lane.
QUIET = "-Wno-maybe-uninitialized"
PACKAGES = {"clang++": "clang", GCC: "g++-aarch64-linux-gnu"}


@pytest.mark.parametrize(
    ("compiler", "flags"),
    [
        ("clang++", ["--target=x86_64-linux-gnu"]),
        ("clang++", ["--target=x86_64-linux-gnu", *AVX2]),
        ("clang++", ["--target=x86_64-linux-gnu", *AVX512]),
        ("clang++", ["--target=x86_64-linux-gnu", *AVX512, "-mavx512vnni"]),
        ("clang++", ["--target=aarch64-linux-gnu"]),
        ("clang++", ["--target=aarch64-linux-gnu", *DOTPROD]),
        (GCC, [QUIET]),
        (GCC, [QUIET, *DOTPROD]),
    ],
)
@pytest.mark.parametrize("source", ["sweep", "product", "rounding", "functions"])
def test_compiles(compiler, flags, source, tmp_path):
    # For aarch64, Clang takes the headers of GCC.
    needed = {compiler, GCC} if "--target=aarch64-linux-gnu" in flags else {compiler}
    for program in needed:
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed (Debian, Ubuntu: {PACKAGES[program]})")
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
