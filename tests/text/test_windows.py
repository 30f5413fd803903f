"""Windows: training takes equal ones, scoring takes every token exactly once."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from bkcore.errors import DTypeError, InputError, ShapeError
from bkcore.text import TokenWindows, scored_windows, write_shards

BOS = 9999


@given(count=st.integers(1, 200), length=st.integers(1, 60))
def test_every_token_is_a_target_once(count: int, length: int) -> None:
    tokens = torch.arange(count)
    windows = list(scored_windows(tokens, length, BOS))
    assert torch.equal(torch.cat([targets for _, targets in windows]), tokens)
    stream = torch.cat([torch.tensor([BOS]), tokens])
    for k, (inputs, targets) in enumerate(windows):
        assert torch.equal(inputs, stream[k * length : k * length + length][: len(targets)])
        assert torch.equal(targets, stream[k * length + 1 : k * length + length + 1])
    assert all(len(targets) == length for _, targets in windows[:-1])
    assert 1 <= len(windows[-1][1]) <= length


@given(count=st.integers(2, 200), length=st.integers(2, 60))
def test_training_windows_are_contiguous(count: int, length: int) -> None:
    tokens = torch.arange(count, dtype=torch.int32)
    if count < length:
        with pytest.raises(InputError, match=f"{count} tokens, fewer than one window of {length}"):
            TokenWindows(tokens, length)
        return
    windows = TokenWindows(tokens, length)
    assert len(windows) == count // length
    items = [windows[i] for i in range(len(windows))]
    assert all(torch.equal(item["input_ids"], item["labels"]) for item in items)
    joined = torch.cat([item["input_ids"] for item in items])
    assert joined.dtype == torch.int64
    assert torch.equal(joined, tokens[: len(windows) * length].long())


def test_a_loader_stacks_training_windows() -> None:
    batch = next(iter(DataLoader(TokenWindows(torch.arange(100), 8), batch_size=3)))
    assert torch.equal(batch["input_ids"], torch.arange(24).view(3, 8))
    assert torch.equal(batch["labels"], batch["input_ids"])


def test_training_windows_outside_of_range_raise() -> None:
    windows = TokenWindows(torch.arange(10), 4)
    assert windows[-1]["input_ids"].tolist() == [4, 5, 6, 7]
    with pytest.raises(IndexError):
        windows[2]


def test_impossible_lengths() -> None:
    with pytest.raises(InputError, match="length must be at least 2, not 1"):
        TokenWindows(torch.arange(10), 1)
    with pytest.raises(InputError, match="length must be at least 1, not 0"):
        scored_windows(torch.arange(10), 0, BOS)


def test_nothing_to_score_and_an_impossible_start() -> None:
    with pytest.raises(InputError, match="no token"):
        scored_windows(torch.arange(0), 4, BOS)
    with pytest.raises(InputError, match=r"bos_id must be .*, not -1"):
        scored_windows(torch.arange(4), 4, -1)


def test_tokens_are_a_flat_integer_tensor() -> None:
    with pytest.raises(ShapeError, match=r"tokens must have .*not \(2, 2\)"):
        scored_windows(torch.zeros(2, 2, dtype=torch.int64), 2, BOS)
    for dtype in (torch.float32, torch.complex64, torch.bool):
        with pytest.raises(DTypeError, match="must be integer token ids"):
            TokenWindows(torch.zeros(4, dtype=dtype), 2)


def test_windows_over_shards_are_those_over_a_tensor(tmp_path: Path) -> None:
    tokens = torch.randint(0, 500, (103,), generator=torch.Generator().manual_seed(0))
    shards = write_shards(
        tmp_path / "tokens",
        [tokens],
        vocab_size=500,
        tokenizer_hash="t",
        text_hash="x",
        shard_tokens=10,
    )
    on_disk, in_memory = TokenWindows(shards, 8), TokenWindows(tokens, 8)
    assert len(on_disk) == len(in_memory) == 12
    for index in (*range(12), -1):
        assert torch.equal(on_disk[index]["input_ids"], in_memory[index]["input_ids"])
        assert on_disk[index]["labels"].dtype == torch.int64
    with pytest.raises(IndexError):
        on_disk[12]
    with pytest.raises(InputError, match="103 tokens, fewer than one window of 104"):
        TokenWindows(shards, 104)
