"""Every version that pyproject.toml allows is one that is tested, at both ends; and bkcore and its
runtime have one version."""

import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import bkcore
import bkcore_runtime

if sys.version_info < (3, 11):
    pytest.skip("tomllib came with Python 3.11", allow_module_level=True)

import tomllib

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
RUNTIME = tomllib.loads((ROOT / "runtime" / "pyproject.toml").read_text(encoding="utf-8"))
OWN = {"bkcore", "bkcore-runtime"}


def allowed(*extras: str) -> dict[str, Requirement]:
    groups = PROJECT["project"]["optional-dependencies"]
    lines = [*PROJECT["project"]["dependencies"], *PROJECT["build-system"]["requires"]]
    requirements = [Requirement(line) for extra in extras for line in groups[extra]]
    requirements += [Requirement(line) for line in lines]
    return {canonicalize_name(each.name): each for each in requirements if each.name not in OWN}


def pinned(name: str) -> dict[str, str]:
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    requirements = [Requirement(line) for line in lines if line and not line.startswith("#")]
    versions: dict[str, str] = {}
    for each in requirements:
        (specifier,) = each.specifier
        assert specifier.operator == "=="
        versions[canonicalize_name(each.name)] = specifier.version
    return versions


def test_no_one_compiles_llama_cpp_without_wishing_to() -> None:
    assert "llama-cpp-python" in allowed("bench")
    groups = PROJECT["project"]["optional-dependencies"]
    named = {name for name, lines in groups.items() if "bench" in str(lines) and name != "bench"}
    assert not named
    assert "llama-cpp-python" not in allowed(*(name for name in groups if name != "bench"))


def test_the_lowest_versions_are_the_bounds() -> None:
    lowest = pinned("constraints-lowest.txt")
    bounds = allowed("data", "plot", "gpu", "test")
    assert lowest.keys() == bounds.keys()
    for name, requirement in bounds.items():
        (bound,) = requirement.specifier
        assert bound.operator == ">="
        assert Version(bound.version) == Version(lowest[name])


def test_the_versions_to_work_with_are_allowed() -> None:
    versions = pinned("constraints.txt")
    bounds = allowed("data", "plot", "gpu", "test", "docs", "dev")
    assert versions.keys() == bounds.keys()
    for name, requirement in bounds.items():
        assert requirement.specifier.contains(versions[name])


def test_the_runtime_asks_for_no_other_versions() -> None:
    bounds = {str(each) for each in allowed().values()}
    needed = [*RUNTIME["project"]["dependencies"], *RUNTIME["build-system"]["requires"]]
    assert {str(Requirement(line)) for line in needed} <= bounds
    assert RUNTIME["project"]["requires-python"] == PROJECT["project"]["requires-python"]


def test_both_distributions_have_one_version() -> None:
    version = PROJECT["project"]["version"]
    assert RUNTIME["project"]["version"] == version
    assert f"bkcore-runtime=={version}" in PROJECT["project"]["dependencies"]
    assert bkcore.__version__ == bkcore_runtime.__version__ == version
