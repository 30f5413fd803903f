"""Imports run one way through the packages, so that each can be read without the ones above it."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "bkcore"

# Each package may import itself and what stands to its right; these are open to all.
OPEN = {"errors", "manifest", "memory", "outputs", "processes", "products", "reading"}
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "manifest": set(),
    "memory": set(),
    "outputs": set(),
    "processes": set(),
    "products": set(),
    "reading": set(),
    "kernels": set(),
    "core": {"kernels"},
    "quantization": {"core", "kernels"},
    "model": {"quantization", "core"},
    "text": set(),
    "evaluation": {"model", "quantization", "text"},
    "training": {"model", "text"},
    "report": {"evaluation", "training", "model", "text", "quantization"},
    "bench": {"report", "evaluation", "model", "text", "quantization", "core", "kernels"},
    "comparison": {"report", "evaluation", "training", "model", "text"},
    "cli": {"report", "bench", "comparison"},
}


def imported_packages(path: Path) -> set[str]:
    """First-level parts of bkcore that a file imports, at its top or inside functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
        elif isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
    return {name.split(".")[1] for name in names if name.startswith("bkcore.")}


def files() -> list[Path]:
    return [
        path
        for path in sorted(SOURCE.rglob("*.py"))
        if path.relative_to(SOURCE).parts[0] not in ("__init__.py", "__main__.py")
    ]


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_run_one_way(path: Path) -> None:
    package = path.relative_to(SOURCE).parts[0].removesuffix(".py")
    extra = imported_packages(path) - ALLOWED[package] - {package} - OPEN
    assert not extra, f"{package} must not import {sorted(extra)}"


def test_the_core_does_not_import_transformers() -> None:
    code = "import sys, bkcore; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_public_names_exist() -> None:
    import bkcore

    for name in bkcore.__all__:
        assert getattr(bkcore, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = bkcore.nothing
