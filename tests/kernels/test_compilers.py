"""The kernels compile with Clang, and for aarch64, without a warning."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[2] / "csrc" / "sweep_kernel.cpp"
COMMON = ["-std=c++17", "-O1", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
WARNINGS = ["-Wall", "-Wextra", "-Werror", "-Wno-psabi"]
# As in CMakeLists.txt.
AVX2 = ["-mavx2", "-mfma"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl"]


@pytest.mark.parametrize(
    ("compiler", "package", "isa", "flags"),
    [
        ("clang++", "clang", "baseline", ["--target=x86_64-linux-gnu"]),
        ("clang++", "clang", "avx2", ["--target=x86_64-linux-gnu", *AVX2]),
        ("clang++", "clang", "avx512", ["--target=x86_64-linux-gnu", *AVX512]),
        # GCC does not see that a unit of work has at least one lane.
        (
            "aarch64-linux-gnu-g++",
            "g++-aarch64-linux-gnu",
            "baseline",
            ["-Wno-maybe-uninitialized"],
        ),
    ],
)
def test_compiles(compiler, package, isa, flags, tmp_path):
    if shutil.which(compiler) is None:
        pytest.skip(f"{compiler} is not installed (Debian, Ubuntu: the package {package})")
    command = [compiler, *COMMON, *WARNINGS, *flags, f"-DBKCORE_ISA={isa}", "-c", str(SOURCE)]
    result = subprocess.run(
        [*command, "-o", str(tmp_path / "kernel.o")], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
