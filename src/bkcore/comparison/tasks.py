"""Three tasks that no short convolution can solve, as seeded generators.

Each sequence asks for tokens that appeared earlier in it, and only the answers count in the loss.
The answers cannot be guessed from the last `BLIND` tokens: two layers of convolutions of width 4
see seven tokens, and the answer is always further back.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Generator, Tensor
from torch.utils.data import Dataset

BLIND = 7
"""How many of the last tokens say nothing about the next answer."""

_IGNORED = -100


@dataclass(frozen=True, eq=False)
class Examples:
    """Sequences with questions.

    Attributes:
        input_ids: int64 (B, N).
        labels: int64 (B, N), as in transformers: `labels[:, i]` is to be predicted from
            `input_ids[:, :i]`; -100 where nothing is asked.
        distance: int64 (B, N), where something is asked: how many tokens the answer was written
            before the last one seen, `input_ids[:, i - 1]`, at least `BLIND`; elsewhere 0.
    """

    input_ids: Tensor
    labels: Tensor
    distance: Tensor


class ExampleWindows(Dataset[dict[str, Tensor]]):
    """Examples as a data set for training."""

    def __init__(self, examples: Examples) -> None:
        self._examples = examples

    def __len__(self) -> int:
        return len(self._examples.input_ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        examples = self._examples
        return {"input_ids": examples.input_ids[index], "labels": examples.labels[index]}


@dataclass(frozen=True)
class Task:
    """A task.

    Attributes:
        name: for file names, tables and JSON.
        source: the paper it comes from.
        vocab_size: tokens.
        length: N of its sequences.
        chance: the best expected accuracy of a model that sees only the last `BLIND` tokens.
        draw: draws a number of sequences with a generator.
    """

    name: str
    source: str
    vocab_size: int
    length: int
    chance: float
    draw: Callable[[int, Generator], Examples]


def recall(count: int, generator: Generator) -> Examples:
    """Multi-query associative recall: 16 keys with values, then each key once, in any order.

    Token 0 fills the gaps, 1 to 63 are keys, 64 to 127 values. The keys of a sequence are distinct;
    values are drawn independently.
    """
    pairs, keys, values, length = 16, 63, 64, 128
    written = 2 * pairs
    first_query = written + BLIND + 1
    key = 1 + _distinct(count, keys, pairs, generator)
    value = 1 + keys + torch.randint(values, (count, pairs), generator=generator)
    slots = (length - first_query) // 2
    asked = first_query + 2 * _distinct(count, slots, pairs, generator)
    where = torch.arange(1, written, 2).expand(count, -1)
    input_ids = torch.zeros(count, length, dtype=torch.int64)
    input_ids[:, :written] = torch.stack((key, value), 2).flatten(1)
    input_ids.scatter_(1, asked, key).scatter_(1, asked + 1, value)
    return _examples(input_ids, asked, value, where)


def copying(count: int, generator: Generator) -> Examples:
    """Selective copying: 8 of 64 tokens are not blanks, and are asked for in their order.

    Token 0 is a blank, 1 asks for the next token, 2 to 17 are to be copied, drawn independently.
    """
    items, symbols, context = 8, 16, 64
    symbol = 2 + torch.randint(symbols, (count, items), generator=generator)
    where = _distinct(count, context, items, generator).sort(1).values
    input_ids = torch.zeros(count, context + items + 1, dtype=torch.int64)
    input_ids[:, context:] = 1
    input_ids.scatter_(1, where, symbol)
    asked = torch.arange(context, context + items).expand(count, -1)
    return _examples(input_ids, asked, symbol, where)


def induction(count: int, generator: Generator) -> Examples:
    """Induction: 64 distinct tokens of 128, then a repetition starting at a random one of them.

    Each sequence jumps back by a random 8 to 64 tokens. The first token after the jump cannot be
    known and is not asked for.
    """
    symbols, context, length = 128, 64, 128
    period = torch.randint(BLIND + 1, context + 1, (count, 1), generator=generator)
    distinct = _distinct(count, symbols, context, generator)
    later = torch.arange(context, length)
    source = context - period + (later - context) % period
    input_ids = torch.cat((distinct, distinct.gather(1, source)), 1)
    asked = later[:-1].expand(count, -1)
    return _examples(input_ids, asked, input_ids[:, context + 1 :], asked + 1 - period)


TASKS = (
    Task("recall", "Arora et al., Zoology, 2023", 128, 128, 1 / 64, recall),
    Task("copying", "Gu and Dao, Mamba, 2023", 18, 73, 1 / 16, copying),
    # The answer is none of the last `BLIND` tokens, which are distinct.
    Task("induction", "Olsson et al., 2022", 128, 128, 1 / (128 - BLIND), induction),
)


def _distinct(count: int, range_: int, size: int, generator: Generator) -> Tensor:
    """Rows of distinct integers below `range_`, in random order: (count, size)."""
    return torch.rand(count, range_, generator=generator).argsort(1)[:, :size]


def _examples(input_ids: Tensor, asked: Tensor, answer: Tensor, where: Tensor) -> Examples:
    """Examples with questions at `asked`, whose answers were written at `where`, all (B, Q)."""
    labels = torch.full_like(input_ids, _IGNORED)
    distance = torch.zeros_like(input_ids)
    labels.scatter_(1, asked + 1, answer)
    distance.scatter_(1, asked + 1, asked - where)
    return Examples(input_ids, labels, distance)
