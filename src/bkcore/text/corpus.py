"""Sources of text: a folder, a Hugging Face data set, or the texts that Python itself carries."""

import hashlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from bkcore.errors import DataError
from bkcore.text import hub
from bkcore.text.embedded import embedded_parts
from bkcore.text.heldout import split_blocks
from bkcore.text.text_files import read_pieces, with_line_end

MIN_TRAIN_CHARACTERS = 20_000
MIN_VALID_CHARACTERS = 2_000

_WORD = re.compile(r"\S+")

EMBEDDED = "embedded"
"""The name for the embedded corpus, unless there is a folder of that name."""

Pieces = Callable[[], Iterator[str]]
"""Each call reads the text again from the start, piece by piece."""


@dataclass(frozen=True)
class Corpus:
    """A text in two parts.

    Attributes:
        name: its name in reports.
        train: the text to train a tokenizer and a model on.
        valid: held-out text, on which perplexities are measured.
    """

    name: str
    train: str
    valid: str


@dataclass(frozen=True)
class StreamedCorpus:
    """A corpus whose train part is read as often as needed and is never all in memory.

    Attributes:
        name: its name in reports.
        train: yields the train part in pieces; joined, they are the text.
        valid: held-out text, in memory.
        characters: length of the train part.
        sha256: of the train part in UTF-8, 64 hexadecimal digits.
    """

    name: str
    train: Pieces
    valid: str
    characters: int
    sha256: str


def load_corpus(data: str | Path | None = None) -> Corpus:
    """Read a whole corpus into memory; arguments and errors as in `open_corpus`."""
    corpus = open_corpus(data)
    return Corpus(corpus.name, "".join(corpus.train()), corpus.valid)


def load_split(data: str | Path | None, split: str) -> tuple[str, str]:
    """Read one part of a corpus into memory, even if the other is missing.

    Args:
        data: as in `open_corpus`.
        split: "train" or "valid".

    Returns:
        The name of the corpus, and the text of the part.

    Raises:
        DataError: as in `open_corpus`, for this part alone.
    """
    name, train, valid = _parts(data)
    pieces, minimum = {
        "train": (train, MIN_TRAIN_CHARACTERS),
        "valid": (valid, MIN_VALID_CHARACTERS),
    }[split]
    text = "".join(pieces())
    _check_size(len(text) if text.strip() else 0, f"the {split} part of {name!r}", minimum)
    return name, text


def open_corpus(data: str | Path | None = None) -> StreamedCorpus:
    r"""Open a corpus, reading all of it once to check that it is fit to train on.

    Args:
        data: one of these.

            - A folder that holds ``train.txt`` and ``valid.txt``.
            - A folder of other ``.txt`` files, at any depth. They are joined in the order of their
              paths. Every twentieth block of about 2,000 characters is held out as the valid part,
              at most a thousand blocks; see `bkcore.text.heldout`.
            - A folder written by `datasets.DatasetDict.save_to_disk`, or the name of a Hugging
              Face data set, ``OWNER/NAME`` or ``OWNER/NAME:CONFIG``. Its splits ``train`` and
              ``validation`` are used; without the latter, blocks are held out as above.
            - None, for the embedded corpus, which depends only on the running version of Python.

            Files are UTF-8; a byte order mark is dropped and ``\r\n`` is read as ``\n``.

    Returns:
        The corpus, named after the folder, the data set or the version of Python.

    Raises:
        DataError: if the text is missing, unreadable, not text, empty or too small (under 20,000
            characters of train or 2,000 of valid), or the data set cannot be fetched.
    """
    name, train, valid = _parts(data)
    characters, digest = _survey(train)
    _check_size(characters, f"the train part of {name!r}", MIN_TRAIN_CHARACTERS)
    valid_text = "".join(valid())
    _check_size(
        len(valid_text) if valid_text.strip() else 0,
        f"the valid part of {name!r}",
        MIN_VALID_CHARACTERS,
    )
    return StreamedCorpus(name, train, valid_text, characters, digest)


def count_words(text: str) -> int:
    """Count words for the perplexity per word: runs between whitespace, plus line ends.

    A line end counts as a word, because published word-level corpora have a token for it.
    """
    return sum(1 for _ in _WORD.finditer(text)) + text.count("\n")


def check_place(data: str | Path | None) -> None:
    """Check that a corpus could be where `data` says, without reading any text.

    Raises:
        DataError: if there is no such folder and no data set can have this name, the folder holds
            no text, or the package for data sets is missing.
    """
    if data is None:
        return
    folder = Path(data)
    if hub.is_saved(folder):
        hub.require_package()
    elif folder.is_dir():
        if next(folder.rglob("*.txt"), None) is None:
            raise DataError(
                f"{str(folder)!r} holds no .txt file; name a folder that holds train.txt and "
                "valid.txt, or other .txt files"
            )
    elif folder.exists():
        raise DataError(
            f"{str(folder)!r} is not a folder; name the folder that holds train.txt and valid.txt"
        )
    elif hub.is_name(str(data)):
        if str(data) != EMBEDDED:
            hub.require_package()
    else:
        raise DataError(
            f"there is no folder {str(data)!r}; name a folder that holds train.txt and valid.txt, "
            f"or other .txt files, or {EMBEDDED!r} to use the embedded corpus"
        )


def _parts(data: str | Path | None) -> tuple[str, Pieces, Pieces]:
    """Name, train part and valid part, not yet checked."""
    check_place(data)
    if data is not None and Path(data).exists():
        return _folder_parts(Path(data))
    if data is None or str(data) == EMBEDDED:
        name, train, valid = embedded_parts()
        return name, lambda: iter([train]), lambda: iter([valid])
    return str(data), *_with_valid(*hub.fetched_texts(str(data)))


def _folder_parts(folder: Path) -> tuple[str, Pieces, Pieces]:
    name = folder.resolve().name
    if hub.is_saved(folder):
        return name, *_with_valid(*hub.saved_texts(folder))
    train, valid = folder / "train.txt", folder / "valid.txt"
    if train.exists() or valid.exists():
        return name, lambda: read_pieces(train), lambda: read_pieces(valid)
    paths = sorted(folder.rglob("*.txt"), key=lambda path: path.relative_to(folder).as_posix())

    def pieces() -> Iterator[str]:
        return chain.from_iterable(with_line_end(read_pieces(path)) for path in paths)

    return name, *_with_valid(pieces, None)


def _with_valid(train: Pieces, valid: Pieces | None) -> tuple[Pieces, Pieces]:
    """Hold out a valid part from a text that has none."""
    if valid is not None:
        return train, valid

    def part(held_out: bool) -> Iterator[str]:
        return (block for is_valid, block in split_blocks(train()) if is_valid == held_out)

    return lambda: part(False), lambda: part(True)


def _survey(train: Pieces) -> tuple[int, str]:
    """The number of characters of a text, 0 if all are blank, and its SHA-256."""
    digest, characters, is_blank = hashlib.sha256(), 0, True
    for piece in train():
        digest.update(piece.encode(errors="surrogatepass"))
        characters += len(piece)
        is_blank = is_blank and not piece.strip()
    return 0 if is_blank else characters, digest.hexdigest()


def _check_size(characters: int, what: str, minimum: int) -> None:
    if characters == 0:
        raise DataError(f"there is no text in {what}; put at least {minimum:,} characters there")
    if characters < minimum:
        raise DataError(
            f"there are only {characters:,} characters in {what}; "
            f"put at least {minimum:,} there, since less gives meaningless numbers"
        )
