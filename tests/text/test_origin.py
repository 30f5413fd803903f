"""What a model remembers of its text, and when it is warned of another one."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from bkcore.text import load_corpus, open_corpus, origin_of, warning_of_other_text

TRAIN = "one line of the text that a model was trained on .\n" * 600
VALID = "and one that it was judged by .\n" * 100


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path / "own", TRAIN, VALID)
    return tmp_path / "own"


def write(folder: Path, train: str, valid: str | None) -> None:
    folder.mkdir()
    (folder / "train.txt").write_text(train, encoding="utf-8")
    if valid is not None:
        (folder / "valid.txt").write_text(valid, encoding="utf-8")


def test_a_corpus_has_one_origin_however_it_is_read(folder: Path) -> None:
    found = origin_of(load_corpus(folder))
    assert found == origin_of(open_corpus(folder))
    assert found["name"] == "own"
    assert found["train"] == hashlib.sha256(TRAIN.encode()).hexdigest()
    assert found["valid"] == hashlib.sha256(VALID.encode()).hexdigest()


def test_only_another_text_is_warned_of(folder: Path) -> None:
    origin = origin_of(load_corpus(folder))
    for part, text in (("train", TRAIN), ("valid", VALID)):
        assert warning_of_other_text(origin, folder, "own", part, text) is None
        assert warning_of_other_text(None, folder, "own", part, text + "x") is None
    other = folder.parent / "other"
    write(other, TRAIN + "more", VALID + "more")
    for part, text in (("train", TRAIN + "more"), ("valid", VALID + "more")):
        warning = warning_of_other_text(origin, other, "other", part, text)
        assert warning is not None
        assert "trained on own, but other is another text" in warning
        assert warning.endswith("name the model's own text with --data")


def test_a_train_part_in_another_order_is_the_same_text(folder: Path) -> None:
    origin = origin_of(load_corpus(folder))
    for name, valid, is_same in (("shuffled", VALID, True), ("alone", None, False)):
        place = folder.parent / name
        write(place, "first\n" + TRAIN, valid)
        warning = warning_of_other_text(origin, place, name, "train", "first\n" + TRAIN)
        assert (warning is None) == is_same
