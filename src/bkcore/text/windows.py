"""Token ids cut into windows: one way for training, and one that scores every token."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset

from bkcore.errors import DataError, DTypeError, InputError, ShapeError
from bkcore.text.shards import TokenShards


class TokenWindows(Dataset[dict[str, Tensor]]):
    """Contiguous, non-overlapping windows of equal length; the remainder at the end is dropped.

    An item holds ``input_ids`` and ``labels``, int64 of shape (length,) and equal to each other,
    since transformers models shift the labels themselves.

    Args:
        tokens: integer token ids of shape (tokens,), or token ids on disk, read window by window.
        length: tokens in a window, at least 2, since the first is never a target.

    Raises:
        InputError: if `length` is too small, or there are fewer tokens than one window.
        ShapeError: if `tokens` is not one-dimensional.
        DTypeError: if `tokens` is not of an integer dtype.
    """

    def __init__(self, tokens: Tensor | TokenShards, length: int) -> None:
        if isinstance(tokens, Tensor):
            _check_tokens(tokens)
        if length < 2:
            raise InputError(f"the window length must be at least 2, not {length}")
        if len(tokens) < length:
            raise InputError(
                f"there are {len(tokens)} tokens, fewer than one window of {length}; "
                "give more text or a shorter window"
            )
        self._tokens = tokens
        self._length = length

    def __len__(self) -> int:
        return len(self._tokens) // self._length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        start = range(0, len(self) * self._length, self._length)[index]
        window = self._tokens[start : start + self._length].long()
        return {"input_ids": window, "labels": window}


def spread(windows: TokenWindows, count: int, apart_from: int = 0) -> Tensor:
    """Windows spread evenly over a text, including its first and last.

    Args:
        windows: of the text.
        count: how many, at least 1; all of them if there are fewer.
        apart_from: leave out the windows that a spread of this many takes.

    Returns:
        Token ids, int64 (at most `count`, length).

    Raises:
        DataError: if no window is left.
    """
    taken = set(_evenly(range(len(windows)), apart_from))
    free = [index for index in range(len(windows)) if index not in taken]
    if not free:
        raise DataError(
            f"the text has {len(windows)} windows, and all of them are already taken; give more "
            "text, or take fewer"
        )
    return torch.stack([windows[index]["input_ids"] for index in _evenly(free, count)])


def _evenly(items: Sequence[int], count: int) -> list[int]:
    places = torch.linspace(0, len(items) - 1, min(count, len(items))).long().tolist()
    return [items[place] for place in places]


def scored_windows(tokens: Tensor, length: int, bos_id: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Cut a split into windows in which every token, to the last, is a target exactly once.

    With the stream ``bos_id`` followed by the tokens, the inputs of window k are
    ``stream[k * length : (k + 1) * length]``, and its targets are the same, shifted by one. Only
    the last window may be shorter.

    Args:
        tokens: integer token ids of shape (tokens,), at least one.
        length: targets in a window, at least 1.
        bos_id: the token before the first one; it is never a target.

    Yields:
        Inputs and targets, both int64 of the same shape (n,), 1 <= n <= length.

    Raises:
        InputError: if there is no token, `length` is below 1, or `bos_id` is negative. It is raised
            by the call itself, not with the first window.
        ShapeError: if `tokens` is not one-dimensional.
        DTypeError: if `tokens` is not of an integer dtype.
    """
    _check_tokens(tokens)
    if len(tokens) == 0:
        raise InputError("there is no token to score; give a text that is not empty")
    if length < 1:
        raise InputError(f"the window length must be at least 1, not {length}")
    if bos_id < 0:
        raise InputError(f"bos_id must be a token id of at least 0, not {bos_id}")
    targets = tokens.long()
    inputs = torch.cat([targets.new_tensor([bos_id]), targets[:-1]])
    return zip(inputs.split(length), targets.split(length), strict=True)


def _check_tokens(tokens: Tensor) -> None:
    if tokens.ndim != 1:
        raise ShapeError(f"tokens must have the shape (tokens,), not {tuple(tokens.shape)}")
    if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
        raise DTypeError(f"tokens must be integer token ids, not {tokens.dtype}")
