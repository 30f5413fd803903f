"""Data sets of Hugging Face, by name or as a copy on disk; needs the package `datasets`."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bkcore.errors import DataError

_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?(:[\w.-]+)?")
_VALID_SPLITS = ("validation", "valid", "dev")
_SAVED = "dataset_dict.json"

Texts = Callable[[], Iterator[str]]


def is_name(name: str) -> bool:
    """Whether a name could be that of a data set: `NAME` or `OWNER/NAME`, with `:CONFIG` or not."""
    return _NAME.fullmatch(name) is not None


def is_saved(folder: Path) -> bool:
    """Whether a folder holds what `datasets.DatasetDict.save_to_disk` wrote."""
    return (folder / _SAVED).is_file()


def saved_texts(folder: Path) -> tuple[Texts, Texts | None]:
    """Open a copy on disk; returns as `fetched_texts`.

    Raises:
        DataError: the package is missing, or the copy cannot be read or has no text.
    """
    datasets = _package()
    try:
        splits = datasets.load_from_disk(str(folder))
    except Exception as error:  # whatever a damaged file makes the package raise
        raise DataError(f"The data set in {str(folder)!r} cannot be read: {error}") from error
    return _texts(splits, str(folder))


def fetched_texts(name: str) -> tuple[Texts, Texts | None]:
    """Fetch a data set, unless it is in the package's cache.

    Args:
        name: as in `is_name`, such as ``Salesforce/wikitext:wikitext-2-v1``.

    Returns:
        Functions that give the texts of the train split and of the validation split, one a row;
        None for a validation split that is not there. A row that does not end in a line end gets
        one.

    Raises:
        DataError: the package is missing, the data set cannot be fetched, or it has no text.
    """
    datasets = _package()
    path, _, config = name.partition(":")
    try:
        splits = datasets.load_dataset(path, config or None)
    except Exception as error:  # the network, the hub, the format: each raises its own
        reason = " ".join(str(error).split())
        raise DataError(
            f"There is no folder {name!r}, and no data set of that name could be fetched from "
            f"Hugging Face ({type(error).__name__}: {reason}). Name a folder with train.txt and "
            "valid.txt, check the name, or go online."
        ) from error
    return _texts(splits, name)


def _package() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            "Data sets of Hugging Face need the package datasets: pip install 'bkcore[data]'."
        ) from error
    datasets.disable_progress_bars()
    return datasets


def _texts(splits: Any, name: str) -> tuple[Texts, Texts | None]:
    if not hasattr(splits, "keys") or "train" not in splits:
        found = sorted(splits) if hasattr(splits, "keys") else "no splits"
        raise DataError(f"The data set {name!r} has no split 'train', but {found}.")
    valid = next((split for split in _VALID_SPLITS if split in splits), None)
    train_texts = _rows(splits["train"], name)
    return train_texts, None if valid is None else _rows(splits[valid], name)


def _rows(split: Any, name: str) -> Texts:
    columns = [
        key for key, kind in split.features.items() if getattr(kind, "dtype", "") in _STRINGS
    ]
    if "text" not in columns and len(columns) != 1:
        raise DataError(
            f"The data set {name!r} has no column 'text', nor a single one of strings, but "
            f"{sorted(split.features)}."
        )
    column = "text" if "text" in columns else columns[0]

    def texts() -> Iterator[str]:
        for number, row in enumerate(split):
            text = row[column] or ""
            if "\0" in text:
                raise DataError(
                    f"Row {number} of the data set {name!r} holds NUL, so it is binary."
                )
            yield text if text.endswith("\n") else text + "\n"

    return texts


_STRINGS = ("string", "large_string")
