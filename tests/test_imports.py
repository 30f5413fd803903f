"""Imports run one way through the packages, so that each can be read without the ones above it."""

import ast
import importlib
import re
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "bkcore"

# Each package may import itself and what stands to its right; these are open to all.
OPEN = {
    *("arguments", "deprecated", "errors", "host", "lazy", "manifest", "outputs", "processes"),
    "reading",
}
ALLOWED: dict[str, set[str]] = {
    "arguments": set(),
    "deprecated": set(),
    "errors": set(),
    "manifest": set(),
    "host": set(),
    "lazy": set(),
    "outputs": set(),
    "processes": set(),
    "reading": set(),
    "kernels": set(),
    "core": {"kernels"},
    "quantization": {"core", "kernels"},
    "model": {"quantization", "core", "kernels"},
    "text": set(),
    "evaluation": {"model", "quantization", "text"},
    "training": {"model", "quantization", "text"},
    "display": set(),
    "bench": {
        *("display", "training", "evaluation", "model", "text"),
        *("quantization", "core", "kernels"),
    },
    "comparison": {"display", "evaluation", "training", "model", "text", "quantization"},
    "commands": {
        *("bench", "comparison", "display", "evaluation", "training", "model", "text"),
        "quantization",
    },
    "cli": {"commands"},
}


def files() -> list[Path]:
    return sorted(path for path in SOURCE.rglob("*.py") if path.name != "__main__.py")


def module_of(path: Path) -> str:
    parts = path.relative_to(SOURCE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


PATHS = {module_of(path): path for path in files()}


def imports(path: Path) -> set[tuple[str, str]]:
    """What a file imports of bkcore, at its top or inside functions: modules, and names or ""."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            for name in (alias.name for alias in node.names):
                submodule = f"{node.module}.{name}"
                found.add((submodule, "") if submodule in PATHS else (node.module, name))
        elif isinstance(node, ast.Import):
            found.update((alias.name, "") for alias in node.names)
    return {(module, name) for module, name in found if module.startswith("bkcore.")}


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_run_one_way(path: Path) -> None:
    package = path.relative_to(SOURCE).parts[0].removesuffix(".py")
    if package == "__init__":
        return
    imported = {module.split(".")[1] for module, _ in imports(path)}
    extra = imported - ALLOWED[package] - {package} - OPEN
    assert not extra, f"{package} must not import {sorted(extra)}"


def test_no_modules_import_each_other_in_a_circle() -> None:
    graph = {name: {module for module, _ in imports(path)} for name, path in PATHS.items()}
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def defined(path: Path) -> set[str]:
    """The names that the top level of a file defines, and not only imports."""
    names: set[str] = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names.update(x.id for t in targets for x in ast.walk(t) if isinstance(x, ast.Name))
    return names


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(SOURCE)))
def test_names_come_from_where_they_are_defined(path: Path) -> None:
    """A package hands on names of its own modules only, and a module hands on none."""
    package = module_of(path)
    public = getattr(importlib.import_module(package), "__all__", ())
    for module, name in imports(path):
        if path.name == "__init__.py" and name in public and package != "bkcore":
            assert module.startswith(f"{package}."), f"{package} hands on {module}.{name}"
        if name and PATHS[module].name != "__init__.py":
            assert name in defined(PATHS[module]), f"{module} does not define {name}"


def test_processes_are_started_in_one_place() -> None:
    starting = r"^\s*(import|from) (multiprocessing|subprocess|concurrent|torch\.multiprocessing)\b"
    found = [path.name for path in files() if re.search(starting, path.read_text(), re.MULTILINE)]
    assert found == ["processes.py"]


HEAVY = ("torch", "transformers", "accelerate", "datasets")
"""Packages that take seconds to import."""


@pytest.mark.parametrize("module", ["bkcore", "bkcore.cli", "bkcore.__main__"])
def test_what_is_to_be_quick_imports_nothing_heavy(module: str) -> None:
    code = f"import sys, {module}; sys.exit(str([x for x in {HEAVY} if x in sys.modules] or ''))"
    done = subprocess.run([sys.executable, "-c", code], check=False, stderr=subprocess.PIPE)
    assert done.stderr.strip() == b""


def test_mistakes_are_told_before_anything_heavy_is_imported(tmp_path: Path) -> None:
    """All in one process, which ends at the first command that imports too much."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "recipe.yaml").write_text("training: {stpes: 3}")
    shipped = SOURCE.parents[1] / "checkpoints" / "wikitext2"
    mistakes = {
        "--help": "Usage",
        "--version": "bkcore ",
        "quantise a b": "No such command",
        "quantize missing out": "there is no checkpoint folder",
        f"quantize {shipped} out --mode int8": "did you mean",
        f"quantize {shipped} out --mode qat_int8": "needs --steps",
        f"quantize {shipped} out --mode qat_int8 --steps 1 --learning-rate -1": "learning_rate",
        f"quantize {shipped} {shipped}": "is the checkpoint itself",
        f"quantize {shipped} out --control c": "does not train",
        f"quantize {shipped} out --data empty": "holds no .txt file",
        "evaluate missing": "there is no checkpoint folder",
        f"evaluate {shipped} --reference missing": "there is no checkpoint folder",
        f"evaluate {shipped} --data ./missing": "there is no folder",
        "generate missing": "there is no checkpoint folder",
        "export missing out": "there is no checkpoint folder",
        "receipt missing": "there is no checkpoint folder",
        f"receipt {shipped}": "has no receipt",
        "train --config missing.yaml": "cannot be read",
        "train --config recipe.yaml": "did you mean 'steps'",
        "demo --data ./missing": "there is no folder",
        "compare --data ./missing": "there is no folder",
        "bench kernels --only nothing": "the cases are large",
        "bench inference --only nothing": "the cases are layers",
        "bench stability missing": "there is no checkpoint folder",
        "bench memory --longest 1": "1024",
        "bench stream --length 1": "8000",
    }
    code = f"""if True:
        import sys
        from typer.testing import CliRunner
        from bkcore.cli import app
        for arguments, complaint in {mistakes}.items():
            done = CliRunner().invoke(app, arguments.split())
            said = " ".join(f"{{done.output}} {{done.exception}}".split())
            assert complaint in said, (arguments, said)
            found = [name for name in {HEAVY} if name in sys.modules]
            assert not found, (arguments, found)
    """
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"empty", "recipe.yaml"}


PUBLIC = ["bkcore", "core", "kernels", "model", "quantization", "text", "training"]


@pytest.mark.parametrize("package", PUBLIC)
def test_every_public_name_is_there(package: str) -> None:
    module = importlib.import_module(package if package == "bkcore" else f"bkcore.{package}")
    assert all(getattr(module, name) is not None for name in module.__all__)
    assert set(module.__all__) <= set(dir(module))


@pytest.mark.parametrize("package", ["bkcore", "bkcore.quantization", "bkcore.text"])
def test_a_lazy_package_lacks_what_is_not_there(package: str) -> None:
    module = importlib.import_module(package)
    for name in ("nothing", "nothing.at_all", "__nothing__"):
        assert not hasattr(module, name)


@pytest.mark.parametrize("package", ["quantization", "text", "training"])
def test_type_checkers_notice_names_that_a_lazy_package_lacks(package: str) -> None:
    """They would not, if they saw a `__getattr__`."""
    assert "__getattr__" not in defined(PATHS[f"bkcore.{package}"])


def test_modules_of_a_lazy_package_are_attributes() -> None:
    """As they were when the package imported all of them."""
    code = "import bkcore.text, bkcore.training; bkcore.text.windows, bkcore.training.trainer.train"
    subprocess.run([sys.executable, "-c", code], check=True)


RUNTIME = SOURCE.parents[1] / "runtime" / "src" / "bkcore_runtime"


@pytest.mark.parametrize("path", sorted(RUNTIME.glob("*.py")), ids=lambda path: path.name)
def test_the_runtime_imports_only_what_it_needs(path: Path) -> None:
    found = {
        name.split(".")[0]
        for node in ast.walk(ast.parse(path.read_text()))
        for name in (
            [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else []
        )
    }
    others = found - sys.stdlib_module_names - {"bkcore_runtime"}
    assert others <= {"numpy", "tokenizers"}


def test_public_names_exist() -> None:
    import bkcore

    for name in bkcore.__all__:
        assert getattr(bkcore, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = bkcore.nothing
