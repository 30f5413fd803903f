"""Corpora: what is read, how it is split, and every way a folder can be wrong."""

import hashlib
import platform
import sys
from pathlib import Path

import pytest

from bkcore.errors import DataError
from bkcore.text import Corpus, count_words, load_corpus, load_split, open_corpus
from bkcore.text.corpus import check_place

ENOUGH = "Some words of a text, one line.\n" * 1000


@pytest.fixture(scope="module")
def embedded() -> Corpus:
    return load_corpus(None)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "train.txt").write_text(ENOUGH, encoding="utf-8")
    (tmp_path / "valid.txt").write_text(ENOUGH, encoding="utf-8")
    return tmp_path


def test_a_folder_is_read_as_it_is(folder: Path) -> None:
    (folder / "valid.txt").write_text("Grüße, мир, 世界 \n\n" * 200, encoding="utf-8")
    corpus = load_corpus(folder)
    assert corpus == Corpus(folder.name, ENOUGH, "Grüße, мир, 世界 \n\n" * 200)
    assert load_corpus(str(folder)) == corpus


def test_a_byte_order_mark_and_windows_line_ends_do_not_show(folder: Path) -> None:
    content = b"\xef\xbb\xbf" + ENOUGH.replace("\n", "\r\n").encode()
    (folder / "train.txt").write_bytes(content)
    assert load_corpus(folder).train == ENOUGH


def test_the_embedded_corpus_is_large_and_split_by_document(embedded: Corpus) -> None:
    assert platform.python_version() in embedded.name
    assert len(embedded.train) > 1_000_000
    share = len(embedded.valid) / (len(embedded.train) + len(embedded.valid))
    assert 0.04 < share < 0.13


def test_the_embedded_corpus_repeats_no_paragraph(embedded: Corpus) -> None:
    train, valid = (
        [" ".join(paragraph.split()) for paragraph in text.split("\n\n")]
        for text in (embedded.train, embedded.valid)
    )
    assert len(set(train)) == len(train)
    assert len(set(valid)) == len(valid)
    assert set(train).isdisjoint(valid)


def test_the_embedded_corpus_has_topics_and_docstrings(embedded: Corpus) -> None:
    text = embedded.train + embedded.valid
    assert "The `if` statement" in text or 'The "if" statement' in text
    assert "Compute the hash" in text or "Pretty-print" in text or "JSON" in text


def test_the_embedded_corpus_is_the_same_every_time(embedded: Corpus) -> None:
    assert load_corpus() == embedded


def test_the_embedded_corpus_imports_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = tmp_path / "lib"
    library.mkdir()
    for number in range(300):
        docstring = f"Explain the part number {number} at length. " * 20
        body = f'"""{docstring}"""\nraise RuntimeError("imported")\n'
        (library / f"part_{number:03}.py").write_text(body, encoding="utf-8")
    (library / "broken.py").write_text("this is not Python", encoding="utf-8")
    (library / "test").mkdir()
    (library / "test" / "junk.py").write_text('"""Left out."""', encoding="utf-8")
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(library))
    corpus = load_corpus()
    text = corpus.train + corpus.valid
    assert all(f"number {number} at" in text for number in range(300))
    assert "Left out" not in text


def test_a_library_without_sources_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    with pytest.raises(DataError, match="no text in the train part of 'python-"):
        load_corpus()


def test_words_are_what_stands_between_blanks_and_the_line_ends() -> None:
    assert count_words("") == 0
    assert count_words("one  two\tthree") == 3
    assert count_words(" one two \n\n = three = \n") == 2 + 3 + 3
    text = "".join(f"{chr(code)}a" for code in (*range(0xD800), *range(0xE000, 0x11000)))
    assert count_words(text) == len(text.split()) + 1


def test_words_of_wikitext_are_the_published_ones(wikitext_dir: Path) -> None:
    corpus = load_corpus(wikitext_dir)
    assert count_words(corpus.valid) == 217_646
    assert count_words(corpus.train) == 2_051_910 + 36_718


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no folder .*absent.*train\.txt"):
        load_corpus(tmp_path / "absent")


def test_a_place_is_checked_without_reading(folder: Path, tmp_path: Path) -> None:
    (folder / "train.txt").write_bytes(b"\0")  # whether it is text is not looked at
    for place in (None, folder, str(folder), "embedded"):
        check_place(place)
    (tmp_path / "empty").mkdir()
    wrong = {folder / "train.txt": "is not a folder", tmp_path / "gone": "there is no folder"}
    for place, complaint in {**wrong, tmp_path / "empty": r"holds no \.txt file"}.items():
        with pytest.raises(DataError, match=complaint):
            check_place(place)


def test_a_place_that_needs_a_missing_package_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    (tmp_path / "dataset_dict.json").touch()
    for place in (tmp_path, "owner/name"):
        with pytest.raises(DataError, match=r"pip install 'bkcore\[data\]'"):
            check_place(place)


def test_a_file_is_no_folder(folder: Path) -> None:
    with pytest.raises(DataError, match="is not a folder"):
        load_corpus(folder / "train.txt")


@pytest.mark.parametrize("name", ["train.txt", "valid.txt"])
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(DataError, match=f"no file .*{name}"):
        load_corpus(folder)


def test_a_folder_in_place_of_a_file_cannot_be_read(folder: Path) -> None:
    (folder / "valid.txt").unlink()
    (folder / "valid.txt").mkdir()
    with pytest.raises(DataError, match=r"valid\.txt' cannot be read"):
        load_corpus(folder)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "no text in the valid part"),
        (b" \n" * 5000, "no text in the valid part"),
        (b"short", "only 5 characters in the valid part"),
        (b"caf\xe9 " * 1000, "not UTF-8: byte 3"),
        (b"text\0" * 1000, "NUL bytes"),
        (ENOUGH.encode("utf-16"), "NUL bytes"),
    ],
)
def test_a_file_that_is_no_text_or_too_little(folder: Path, content: bytes, complaint: str) -> None:
    (folder / "valid.txt").write_bytes(content)
    with pytest.raises(DataError, match=complaint):
        load_corpus(folder)


def test_too_little_to_train_on(folder: Path) -> None:
    (folder / "train.txt").write_text("x" * 19_999, encoding="utf-8")
    with pytest.raises(DataError, match="only 19,999 characters in the train part"):
        load_corpus(folder)


def test_a_streamed_corpus_is_the_loaded_one_and_reads_again(folder: Path) -> None:
    corpus = open_corpus(folder)
    for _ in range(2):
        assert "".join(corpus.train()) == ENOUGH
    assert corpus.valid == ENOUGH
    assert corpus.characters == len(ENOUGH)
    assert corpus.sha256 == hashlib.sha256(ENOUGH.encode()).hexdigest()


def test_other_text_files_are_joined_in_order_and_a_part_is_held_out(tmp_path: Path) -> None:
    lines = [f"Line {number} of a text, with some words.\n" for number in range(4000)]
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "second.txt").write_text("".join(lines[2000:]), encoding="utf-8")
    (tmp_path / "a.txt").write_text("".join(lines[:2000]).rstrip("\n"), encoding="utf-8")
    (tmp_path / "notes.md").write_text("not read", encoding="utf-8")
    corpus = load_corpus(tmp_path)
    train, valid = corpus.train.splitlines(True), corpus.valid.splitlines(True)
    assert sorted(train + valid) == sorted(lines)
    assert [line for line in lines if line in set(train)] == train
    assert [line for line in lines if line in set(valid)] == valid
    assert 0.03 < len(corpus.valid) / len("".join(lines)) < 0.06
    assert load_corpus(tmp_path) == corpus


def test_a_folder_without_text_files(tmp_path: Path) -> None:
    (tmp_path / "notes.md").write_text(ENOUGH, encoding="utf-8")
    with pytest.raises(DataError, match=r"holds no \.txt file"):
        load_corpus(tmp_path)


def test_too_little_to_hold_a_part_out_of(tmp_path: Path) -> None:
    (tmp_path / "only.txt").write_text(ENOUGH[:25_000], encoding="utf-8")
    with pytest.raises(DataError, match="no text in the valid part"):
        load_corpus(tmp_path)


def test_an_unreadable_file_among_others_is_named(tmp_path: Path) -> None:
    (tmp_path / "good.txt").write_text(ENOUGH, encoding="utf-8")
    (tmp_path / "photo.txt").write_bytes(b"\x89PNG\xff" * 1000)
    with pytest.raises(DataError, match=r"photo\.txt' is not UTF-8: byte 0"):
        open_corpus(tmp_path)


@pytest.mark.parametrize("split", ["train", "valid"])
def test_a_split_is_read_alone(tmp_path: Path, split: str) -> None:
    (tmp_path / f"{split}.txt").write_text(ENOUGH)
    assert load_split(tmp_path, split) == (tmp_path.name, ENOUGH)
    other = {"train": "valid", "valid": "train"}[split]
    with pytest.raises(DataError, match=f"no file .*{other}.txt"):
        load_split(tmp_path, other)
    (tmp_path / f"{split}.txt").write_text("short")
    with pytest.raises(DataError, match=f"only 5 characters in the {split} part"):
        load_split(tmp_path, split)


def test_splits_are_the_parts_of_the_corpus(embedded: Corpus) -> None:
    assert load_split(None, "train") == (embedded.name, embedded.train)
    assert load_split(None, "valid") == (embedded.name, embedded.valid)


def test_the_embedded_corpus_has_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    name, text = load_split("embedded", "valid")
    assert (name, text) == load_split(None, "valid")
    (tmp_path / "embedded").mkdir()
    (tmp_path / "embedded" / "valid.txt").write_text("a text of the user's own . " * 200)
    assert load_split("embedded", "valid")[0] == "embedded"
