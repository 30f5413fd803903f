"""Where the text comes from: a folder with two files, or what every Python installation carries.

The embedded corpus consists of the documentation topics of ``help()`` and of the docstrings of the
standard library. Its sources are parsed and never imported, so that nothing runs.
"""

import ast
import hashlib
import platform
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from bkcore.errors import DataError

MIN_TRAIN_CHARACTERS = 20_000
MIN_VALID_CHARACTERS = 2_000

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


@dataclass(frozen=True)
class Corpus:
    """A text in two parts.

    Attributes:
        name: what reports call it.
        train: the text to train a tokenizer and a model on.
        valid: held-out text, on which perplexities are measured.
    """

    name: str
    train: str
    valid: str


def load_corpus(folder: str | Path | None = None) -> Corpus:
    r"""Read a corpus, and check that it is fit to train on.

    Args:
        folder: a folder that holds ``train.txt`` and ``valid.txt`` in UTF-8; a byte order mark is
            dropped and ``\r\n`` is read as ``\n``. None takes the embedded corpus, which depends
            on nothing but the version of Python that runs.

    Returns:
        The corpus, named after the folder or after the version of Python.

    Raises:
        DataError: the folder or a file is missing, unreadable, not text, empty or too small
            (under 20,000 characters of train or 2,000 of valid).
    """
    corpus = _embedded_corpus() if folder is None else _folder_corpus(Path(folder))
    _check_size(corpus.train, f"the train part of {corpus.name!r}", MIN_TRAIN_CHARACTERS)
    _check_size(corpus.valid, f"the valid part of {corpus.name!r}", MIN_VALID_CHARACTERS)
    return corpus


def count_words(text: str) -> int:
    """Count words for the perplexity per word: what stands between whitespace, plus line ends.

    A line end counts as a word because the published word-level corpora give it a token.
    """
    return len(text.split()) + text.count("\n")


def _folder_corpus(folder: Path) -> Corpus:
    if not folder.exists():
        raise DataError(
            f"There is no folder {str(folder)!r}. Name a folder that holds train.txt and "
            "valid.txt, or none to use the embedded corpus."
        )
    if not folder.is_dir():
        raise DataError(
            f"{str(folder)!r} is not a folder. Name the folder that holds train.txt and valid.txt."
        )
    train, valid = (_read_text(folder / name) for name in ("train.txt", "valid.txt"))
    return Corpus(folder.resolve().name, train, valid)


def _read_text(path: Path) -> str:
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise DataError(
            f"There is no file {str(path)!r}. A corpus folder holds train.txt and valid.txt."
        ) from None
    except OSError as error:
        raise DataError(
            f"{str(path)!r} cannot be read ({error.strerror}). "
            "Make it a plain file that you may read."
        ) from error
    if b"\0" in content:
        raise DataError(
            f"{str(path)!r} holds NUL bytes, so it is binary or UTF-16. Save it as UTF-8 text."
        )
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{str(path)!r} is not UTF-8: byte {error.start} cannot be decoded. "
            "Save it as UTF-8 text."
        ) from error
    return text.replace("\r\n", "\n")


def _check_size(text: str, what: str, minimum: int) -> None:
    if not text.strip():
        raise DataError(f"There is no text in {what}. Put at least {minimum:,} characters there.")
    if len(text) < minimum:
        raise DataError(
            f"There are only {len(text):,} characters in {what}. "
            f"Put at least {minimum:,} there: less gives numbers that mean nothing."
        )


def _embedded_corpus() -> Corpus:
    documents = _without_repeats(_library_documents(Path(sysconfig.get_path("stdlib"))))
    parts: dict[bool, list[str]] = {True: [], False: []}
    for name, text in documents:
        parts[_is_valid(name)].append(text + "\n")
    return Corpus(
        name=f"python-{platform.python_version()}-docs",
        train="\n".join(parts[False]),
        valid="\n".join(parts[True]),
    )


def _is_valid(name: str) -> bool:
    """Draw a document for the valid part by a hash of its name, whatever the other documents."""
    digest = hashlib.sha256(name.encode()).digest()
    return int.from_bytes(digest[:8], "big") % 100 < _VALID_PERCENT


def _without_repeats(documents: Iterable[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """Keep the first occurrence of every paragraph: topics and docstrings quote each other.

    Without this the valid part would repeat whole pages of the train part.
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
