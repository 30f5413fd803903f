"""The embedded corpus: text that every Python installation carries.

It consists of the documentation topics of ``help()`` and the docstrings of the standard library.
The sources are parsed and never imported, so no code runs.
"""

import ast
import hashlib
import platform
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

_VALID_PERCENT = 4
_TOPICS_FILE = "pydoc_data/topics.py"
_SKIPPED_FOLDERS = frozenset(
    {
        "dist-packages",
        "idlelib",
        "lib2to3",
        "site-packages",
        "test",
        "tests",
        "turtledemo",
    }
)


def embedded_parts() -> tuple[str, str, str]:
    """Return the corpus: its name, with the version of Python, and its train and valid texts."""
    documents = _without_repeats(_library_documents(Path(sysconfig.get_path("stdlib"))))
    parts: dict[bool, list[str]] = {True: [], False: []}
    for name, text in documents:
        parts[_is_valid(name)].append(text + "\n")
    name = f"python-{platform.python_version()}-docs"
    return name, "\n".join(parts[False]), "\n".join(parts[True])


def _is_valid(name: str) -> bool:
    """Choose documents for the valid part by a hash of their names, regardless of the others."""
    digest = hashlib.sha256(name.encode()).digest()
    return int.from_bytes(digest[:8], "big") % 100 < _VALID_PERCENT


def _without_repeats(documents: Iterable[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """Keep only the first occurrence of every paragraph, since topics and docstrings overlap.

    Otherwise the valid part would repeat whole pages of the train part.
    """
    seen: set[str] = set()
    for name, text in documents:
        kept = []
        for paragraph in text.split("\n\n"):
            key = " ".join(paragraph.split())
            if key and key not in seen:
                seen.add(key)
                kept.append(paragraph.strip("\n"))
        if kept:
            yield name, "\n\n".join(kept)


def _library_documents(root: Path) -> Iterator[tuple[str, str]]:
    """Yield (name, text): one document for each topic and one for each file with docstrings."""
    for name, path in _library_sources(root):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tree = ast.parse(path.read_bytes())
        except (OSError, SyntaxError, ValueError):
            continue
        if name == _TOPICS_FILE:
            yield from _topics(tree)
        else:
            yield name, "\n\n".join(_docstrings(tree))


def _library_sources(root: Path) -> list[tuple[str, Path]]:
    paths = ((path.relative_to(root), path) for path in root.rglob("*.py"))
    return sorted(
        (relative.as_posix(), path)
        for relative, path in paths
        if _SKIPPED_FOLDERS.isdisjoint(relative.parts)
    )


def _topics(tree: ast.Module) -> Iterator[tuple[str, str]]:
    for statement in tree.body:
        if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Dict):
            topics: dict[str, str] = ast.literal_eval(statement.value)
            for name in sorted(topics):
                yield f"topic {name}", topics[name]


def _docstrings(node: ast.Module | ast.ClassDef | ast.FunctionDef) -> Iterator[str]:
    """Yield the docstrings of a module, and of the classes and functions in it, top to bottom."""
    docstring = ast.get_docstring(node)
    if docstring:
        yield docstring
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef):
            yield from _docstrings(child)
