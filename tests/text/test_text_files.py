"""Files in pieces give what the file in one gives, and name the byte that is wrong."""

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bkcore.errors import DataError
from bkcore.text import text_files
from bkcore.text.heldout import split_blocks

TEXTS = st.text(alphabet="ab\r\né世\ufeff😀", max_size=40)
SHARED_FOLDER = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


@SHARED_FOLDER
@given(text=TEXTS, size=st.integers(1, 7))
def test_pieces_join_to_the_file(tmp_path: Path, text: str, size: int) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(text.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_files, "_PIECE_BYTES", size)
        found = list(text_files.read_pieces(path))
    expected = path.read_bytes().decode("utf-8-sig").replace("\r\n", "\n")
    assert "".join(found) == expected
    assert all(found)


@SHARED_FOLDER
@given(before=TEXTS, size=st.integers(1, 7), bad=st.sampled_from([b"\xff", b"\xc3a", b"\xe4\xb8"]))
def test_the_bad_byte_is_named(tmp_path: Path, before: str, size: int, bad: bytes) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(before.encode() + bad)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_files, "_PIECE_BYTES", size)
        with pytest.raises(DataError, match=f"byte {len(before.encode())} cannot"):
            list(text_files.read_pieces(path))


@SHARED_FOLDER
@given(before=TEXTS, size=st.integers(1, 7))
def test_the_first_nul_is_named(tmp_path: Path, before: str, size: int) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(before.encode() + b"\0a\0")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_files, "_PIECE_BYTES", size)
        with pytest.raises(DataError, match=f"text.txt.* first at byte {len(before.encode())},"):
            list(text_files.read_pieces(path))


def test_line_ends_are_added_where_they_lack() -> None:
    assert "".join(text_files.with_line_end(["a\n", "b"])) == "a\nb\n"
    assert "".join(text_files.with_line_end(["a", "\n"])) == "a\n"
    assert list(text_files.with_line_end([])) == []


@given(
    lines=st.lists(st.integers(0, 6000), max_size=60),
    cuts=st.lists(st.integers(0, 300_000), max_size=8),
)
def test_blocks_do_not_depend_on_the_pieces(lines: list[int], cuts: list[int]) -> None:
    text = "".join("x" * length + "\n" for length in lines)
    ends = sorted(min(cut, len(text)) for cut in cuts)
    pieces = [text[a:b] for a, b in zip([0, *ends], [*ends, len(text)], strict=True)]
    blocks = list(split_blocks(pieces))
    assert blocks == list(split_blocks([text]))
    assert "".join(block for _, block in blocks) == text
    assert all(block.endswith("\n") and len(block) >= 2000 for _, block in blocks[:-1])
    assert [held for held, _ in blocks] == [number % 20 == 19 for number in range(len(blocks))]


def test_a_text_without_line_ends_is_cut_and_the_held_out_part_is_bounded() -> None:
    text = "y" * 65_536 * 3 + "y\n"
    assert [len(block) for _, block in split_blocks([text])] == [65_536, 65_536, 65_536, 2]
    for end in "\r\x85\u2028":  # line ends, then blanks, where there is no line feed
        line = "one two " * 300 + end
        assert [block for _, block in split_blocks([line * 40])] == [line] * 40
    words = list(split_blocks(["word " * 40_000]))
    assert {len(block) for _, block in words} == {2000}
    assert sum(held for held, _ in words) == 5
    line = "z" * 1999 + "\n"
    held = [held for held, _ in split_blocks(line for _ in range(20_200))]
    assert sum(held) == 1000
    assert not any(held[20_000:])
