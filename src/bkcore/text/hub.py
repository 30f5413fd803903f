"""Hugging Face data sets, by name or as a copy on disk; needs the package `datasets`."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bkcore.errors import DataError

_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?(:[\w.-]+)?")
_VALID_SPLITS = ("validation", "valid", "dev")
_SAVED = "dataset_dict.json"
_MISSING = "Hugging Face data sets need the package datasets; pip install 'bkcore[data]'"

Texts = Callable[[], Iterator[str]]


def is_name(name: str) -> bool:
    """Whether a name could be a data set's: `NAME` or `OWNER/NAME`, with or without `:CONFIG`."""
    return _NAME.fullmatch(name) is not None


def is_saved(folder: Path) -> bool:
    """Whether a folder was written by `datasets.DatasetDict.save_to_disk`."""
    return (folder / _SAVED).is_file()


def saved_texts(folder: Path) -> tuple[Texts, Texts | None]:
    """Open a copy on disk; returns as `fetched_texts`.

    Raises:
        DataError: if the package is missing, or the copy cannot be read or has no text.
    """
    datasets = _package()
    try:
        with _without_bars(datasets):
            splits = datasets.load_from_disk(str(folder))
    except Exception as error:  # a damaged file can make the package raise anything
        raise DataError(f"the data set in {str(folder)!r} cannot be read: {error}") from error
    return _texts(splits, str(folder))


def fetched_texts(name: str) -> tuple[Texts, Texts | None]:
    """Fetch a data set, unless it is in the package's cache.

    Args:
        name: as in `is_name`, such as ``Salesforce/wikitext:wikitext-2-v1``.

    Returns:
        Functions that yield the texts of the train split and of the validation split, one per row;
        None if there is no validation split. A row without a final line end gets one.

    Raises:
        DataError: if the package is missing, the data set cannot be fetched, or it has no text.
    """
    datasets = _package()
    path, _, config = name.partition(":")
    try:
        with _without_bars(datasets):
            splits = datasets.load_dataset(path, config or None)
    except Exception as error:  # the network, the hub, the format: each raises its own
        reason = " ".join(str(error).split())
        raise DataError(
            f"there is no folder {name!r}, and no data set of that name could be fetched from "
            f"Hugging Face ({type(error).__name__}: {reason}); name a folder with train.txt and "
            "valid.txt, check the name, or go online"
        ) from error
    return _texts(splits, name)


def require_package() -> None:
    """Raise `DataError` unless the package is installed, without importing it."""
    if find_spec("datasets") is None:
        raise DataError(_MISSING)


def _package() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise DataError(_MISSING) from error
    return datasets


@contextmanager
def _without_bars(datasets: Any) -> Iterator[None]:
    """Switch off the package's progress bars inside a with block."""
    if datasets.are_progress_bars_disabled():
        yield
        return
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.enable_progress_bars()


def _texts(splits: Any, name: str) -> tuple[Texts, Texts | None]:
    found = sorted(splits) if hasattr(splits, "keys") else []
    valid = next((split for split in _VALID_SPLITS if split in found), None)
    if valid is None and "train" not in found:
        raise _no_train(name, found)
    valid_texts = None if valid is None else _rows(splits[valid], name)
    if "train" in found:
        return _rows(splits["train"], name), valid_texts

    def no_texts() -> Iterator[str]:
        raise _no_train(name, found)

    return no_texts, valid_texts


def _no_train(name: str, found: list[str]) -> DataError:
    return DataError(
        f"the data set {name!r} has no split 'train'; it has {found or 'no splits at all'}"
    )


def _rows(split: Any, name: str) -> Texts:
    columns = [
        key for key, kind in split.features.items() if getattr(kind, "dtype", "") in _STRINGS
    ]
    if "text" not in columns and len(columns) != 1:
        raise DataError(
            f"the data set {name!r} has neither a column 'text' nor a single column of strings; "
            f"it has {sorted(split.features)}"
        )
    column = "text" if "text" in columns else columns[0]

    def texts() -> Iterator[str]:
        for number, row in enumerate(split):
            text = row[column] or ""
            if (nul := text.find("\0")) >= 0:
                raise DataError(
                    f"row {number} of the data set {name!r} holds NUL at character {nul}, so it is "
                    "binary; name a data set of text"
                )
            yield text if text.endswith("\n") else text + "\n"

    return texts


_STRINGS = ("string", "large_string")
