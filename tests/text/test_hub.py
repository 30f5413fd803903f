"""Data sets of Hugging Face, from copies on disk: by the very calls that would fetch them."""

import sys
from pathlib import Path
from typing import Any

import pytest

from bkcore.errors import DataError
from bkcore.text import count_words, load_corpus, load_split

datasets = pytest.importorskip("datasets")

ROWS = ["", " = Title = \n", "Some words of a text, one row .\n", "no line end"] * 900
VALID_ROWS = ["", "Held out words , here .\n"] * 200
README = """---
configs:
- config_name: small-v1
  data_files:
  - split: train
    path: train.parquet
  - split: validation
    path: valid.parquet
---
"""


def joined(rows: list[str]) -> str:
    return "".join(row if row.endswith("\n") else row + "\n" for row in rows)


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No network, and a cache that ends with the test."""
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)


def split(rows: list[str], column: str = "text") -> Any:
    return datasets.Dataset.from_dict({column: rows, "number": list(range(len(rows)))})


def test_a_name_with_a_configuration(tmp_path: Path) -> None:
    # The package takes a folder of this name for the data set, as it would take the hub's.
    folder = tmp_path / "Someone" / "wiki"
    folder.mkdir(parents=True)
    (folder / "README.md").write_text(README)
    split(ROWS).to_parquet(folder / "train.parquet")
    split(VALID_ROWS).to_parquet(folder / "valid.parquet")
    corpus = load_corpus("Someone/wiki:small-v1")
    assert corpus.name == "Someone/wiki:small-v1"
    assert corpus.train == joined(ROWS)
    assert corpus.valid == joined(VALID_ROWS)
    with pytest.raises(DataError, match=r"could be fetched.*large-v1"):
        load_corpus("Someone/wiki:large-v1")


def test_a_saved_data_set_without_validation_holds_blocks_out(tmp_path: Path) -> None:
    datasets.DatasetDict(train=split(ROWS), test=split(["not looked at"])).save_to_disk("saved")
    corpus = load_corpus(tmp_path / "saved")
    assert corpus.name == "saved"
    assert count_words(corpus.train) + count_words(corpus.valid) == count_words(joined(ROWS))
    assert 0 < len(corpus.valid) < 0.1 * len(corpus.train)
    assert "not looked at" not in corpus.train + corpus.valid


@pytest.mark.parametrize(
    ("splits", "complaint"),
    [
        ({"test": split(ROWS)}, r"no split 'train'; it has \['test'\]"),
        ({"train": split(ROWS, "body")}, None),
        (
            {"train": datasets.Dataset.from_dict({"id": [1] * 9})},
            r"neither a column 'text'.*\['id'\]",
        ),
        ({"train": split([*ROWS, "\0"])}, "row 3600 .* NUL"),
        ({"train": split(["short"])}, "only 6 characters in the train part"),
    ],
)
def test_what_a_data_set_must_hold(
    tmp_path: Path, splits: dict[str, Any], complaint: str | None
) -> None:
    datasets.DatasetDict(splits).save_to_disk("saved")
    if complaint is None:
        assert len(load_corpus("saved").train) > 20_000
    else:
        with pytest.raises(DataError, match=complaint):
            load_corpus("saved")


def test_a_damaged_copy(tmp_path: Path) -> None:
    datasets.DatasetDict(train=split(ROWS)).save_to_disk("saved")
    (tmp_path / "saved" / "train" / "dataset_info.json").write_text("{")
    with pytest.raises(DataError, match="cannot be read"):
        load_corpus("saved")


def test_a_name_that_cannot_be_fetched_says_so() -> None:
    with pytest.raises(DataError, match=r"no folder 'no-one/nothing', and no data set .* fetched"):
        load_corpus("no-one/nothing")


def test_a_missing_package_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"pip install 'bkcore\[data\]'"):
        load_corpus("no-one/nothing")


def test_a_data_set_without_train_has_its_validation(tmp_path: Path) -> None:
    datasets.DatasetDict(validation=split(VALID_ROWS)).save_to_disk("saved")
    assert load_split("saved", "valid") == ("saved", joined(VALID_ROWS))
    with pytest.raises(DataError, match=r"no split 'train'; it has \['validation'\]"):
        load_split("saved", "train")


@pytest.mark.parametrize("shown", [True, False])
def test_progress_bars_are_as_before(tmp_path: Path, shown: bool) -> None:
    datasets.DatasetDict(train=split(ROWS)).save_to_disk("saved")
    (datasets.enable_progress_bars if shown else datasets.disable_progress_bars)()
    try:
        load_corpus("saved")
        assert datasets.are_progress_bars_disabled() is not shown
    finally:
        datasets.enable_progress_bars()
