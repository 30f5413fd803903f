"""Each question of the synthetic tasks has one right answer, and it stands far back."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bkcore.comparison.tasks import BLIND, TASKS, Examples, Task


@pytest.fixture(params=TASKS, ids=lambda task: task.name)
def task(request: pytest.FixtureRequest) -> Task:
    return request.param


def draw(task: Task, count: int, seed: int = 0) -> Examples:
    return task.draw(count, torch.Generator().manual_seed(seed))


def questions(examples: Examples) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, positions of the last token seen, and answers."""
    rows, positions = (examples.labels != -100).nonzero(as_tuple=True)
    return rows, positions - 1, examples.labels[rows, positions]


def test_shapes_and_repeatability(task: Task) -> None:
    examples = draw(task, 5)
    assert examples.input_ids.shape == examples.labels.shape == (5, task.length)
    assert int(examples.input_ids.min()) >= 0
    assert int(examples.input_ids.max()) < task.vocab_size
    assert torch.equal(draw(task, 5).input_ids, examples.input_ids)
    assert not torch.equal(draw(task, 5, seed=1).input_ids, examples.input_ids)


def test_the_answer_stands_where_the_distance_says(task: Task) -> None:
    examples = draw(task, 200)
    rows, last, answers = questions(examples)
    distance = examples.distance[rows, last + 1]
    assert int(distance.min()) >= BLIND
    assert torch.equal(examples.input_ids[rows, last - distance], answers)
    assert torch.equal(examples.distance > 0, examples.labels != -100)


def test_each_question_has_one_right_answer(task: Task) -> None:
    """Solve each task by its definition, looking at what came before the question only."""
    examples = draw(task, 20)
    for row, last, answer in zip(*map(Tensor.tolist, questions(examples)), strict=True):
        seen = examples.input_ids[row, : last + 1].tolist()
        if task.name == "copying":
            written = [token for token in seen if token > 1]
            assert len(written) == 8
            assert written[seen.count(1) - 1] == answer
        else:
            places = [i for i in range(last) if seen[i] == seen[last]]
            assert places
            assert {seen[i + 1] for i in places} == {answer}
            if task.name == "recall":
                assert len(places) == 1


def test_distances_are_spread(task: Task) -> None:
    distance = draw(task, 500).distance
    found = distance[distance > 0].double()
    assert float(found.quantile(0.9)) > 1.8 * float(found.quantile(0.1))
    assert float(found.max()) >= 62


def test_a_convolution_stays_at_chance(task: Task) -> None:
    """Two layers of width 4 learn from 6,000 sequences and are asked others."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Embedding(task.vocab_size, 32),
        _Convolution(32),
        _Convolution(32),
        nn.Linear(32, task.vocab_size),
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    train = draw(task, 6_000)
    for batch in torch.arange(6_000).split(60):
        optimizer.zero_grad()
        logits = model(train.input_ids[batch])[:, :-1]
        F.cross_entropy(logits.flatten(0, 1), train.labels[batch, 1:].flatten()).backward()
        optimizer.step()
    test = draw(task, 500, seed=1)
    rows, last, answers = questions(test)
    right = (model(test.input_ids)[rows, last].argmax(-1) == answers).double()
    # Questions of one sequence are not independent: the spread is taken over sequences.
    by_sequence = right.view(500, -1).mean(1)
    error = float(by_sequence.std()) / 500**0.5
    assert float(right.mean()) < task.chance + 4 * error


class _Convolution(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.convolution = nn.Conv1d(width, width, 4)
        self.mlp = nn.Sequential(nn.Linear(width, 64), nn.SiLU(), nn.Linear(64, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + F.silu(self.convolution(F.pad(x.transpose(1, 2), (3, 0)))).transpose(1, 2)
        return x + self.mlp(x)


def test_chance_is_the_best_guess_from_what_is_near(task: Task) -> None:
    """Counted answers: given any one of the last tokens, none is likelier than chance allows."""
    examples = draw(task, 20_000)
    rows, last, answers = questions(examples)
    for back in range(BLIND):
        near = examples.input_ids[rows, last - back]
        # A repetition asks for the same again: count what differs, which is independent.
        keys = (rows * task.vocab_size + near) * task.vocab_size + answers
        counted = keys.unique() % task.vocab_size**2
        pairs = torch.bincount(counted, minlength=task.vocab_size**2)
        pairs = pairs.view(task.vocab_size, task.vocab_size).double()
        seen = pairs.sum(1)
        guess = pairs.max(1).values[seen > 0]
        expected = task.chance * seen[seen > 0]
        # The largest of 128 x 128 counts stays within six standard deviations.
        assert bool((guess < expected + 6 * expected.sqrt()).all())
