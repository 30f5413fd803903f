"""The text a model was trained on, and a warning when it is used with another one."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from bkcore.errors import DataError
from bkcore.text.corpus import Corpus, StreamedCorpus, load_split

Origin = Mapping[str, str]
"""`name` of a corpus, and `train` and `valid`: the SHA-256 of its parts in UTF-8."""

_COST = {
    "train": "codes that are fitted to it may cost more on the model's own text",
    "valid": "its perplexity says little about the model",
}


def origin_of(corpus: Corpus | StreamedCorpus) -> dict[str, str]:
    """The `Origin` that a model trained on a corpus records."""
    train = corpus.sha256 if isinstance(corpus, StreamedCorpus) else _sha256(corpus.train)
    return {"name": corpus.name, "train": train, "valid": _sha256(corpus.valid)}


def is_part_of(origin: Origin | None, part: str, text: str) -> bool:
    """Whether a text is exactly the "train" or "valid" part that a model was trained with."""
    return origin is not None and origin[part] == _sha256(text)


def warning_of_other_text(
    origin: Origin | None, data: str | Path | None, name: str, part: str, text: str
) -> str | None:
    """A warning if a model is used with a text that it was not trained on, else None.

    A different train part still counts as the same text if its valid part is the same: it may only
    be in another order.

    Args:
        origin: what the model recorded; None if it recorded nothing, and then there is no warning.
        data: where the text comes from, as in `bkcore.text.load_split`.
        name: the name of that corpus in reports.
        part: "train" or "valid".
        text: all of that part.
    """
    if origin is None or is_part_of(origin, part, text):
        return None
    if part == "train" and _has_same_valid(origin, data):
        return None
    return (
        f"warning: the model was trained on {origin['name']}, but {name} is another text; "
        f"{_COST[part]}; name the model's own text with --data"
    )


def _has_same_valid(origin: Origin, data: str | Path | None) -> bool:
    try:
        return is_part_of(origin, "valid", load_split(data, "valid")[1])
    except DataError:  # there is only a train part
        return False


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
