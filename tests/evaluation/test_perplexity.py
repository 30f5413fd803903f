"""Perplexity against models whose probabilities are known, and intervals that cover."""

import dataclasses
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor, nn

from bkcore.errors import DTypeError, InputError, ShapeError
from bkcore.evaluation import logits, perplexity
from bkcore.evaluation.perplexity import (
    Change,
    Protocol,
    Scores,
    kl_divergence,
    paired_change,
    perplexity_per_token,
    perplexity_per_word,
    score,
    standard_error,
)
from bkcore.text import count_words, load_corpus

VOCABULARY = 7
BOS = 0


class Bigram(nn.Module):
    """Next-token logits that depend on the last token alone."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.table = nn.Parameter(logits)
        self.batches: list[tuple[int, ...]] = []
        self.modes: list[bool] = []

    def forward(self, input_ids: Tensor) -> SimpleNamespace:
        self.batches.append(tuple(input_ids.shape))
        self.modes.append(self.training)
        return SimpleNamespace(logits=self.table[input_ids])


def uniform(input_ids: Tensor) -> Tensor:
    return torch.full((*input_ids.shape, VOCABULARY), -3.5)


def random_bigram(seed: int = 0) -> Bigram:
    generator = torch.Generator().manual_seed(seed)
    return Bigram(3 * torch.randn(VOCABULARY, VOCABULARY, generator=generator))


def random_tokens(count: int, seed: int = 0) -> Tensor:
    return torch.randint(VOCABULARY, (count,), generator=torch.Generator().manual_seed(seed))


def make_scores(nll: list[float], tokens: list[int]) -> Scores:
    return Scores(torch.tensor(nll, dtype=torch.float64), torch.tensor(tokens), 1.0)


def test_uniform_logits_have_the_perplexity_of_the_vocabulary() -> None:
    scores = score(uniform, random_tokens(101), window=8, batch_size=4, bos_id=BOS)
    assert scores.total_tokens == 101
    assert perplexity_per_token(scores) == pytest.approx(VOCABULARY, rel=1e-6)
    assert perplexity_per_word(scores, 50) == pytest.approx(VOCABULARY ** (101 / 50), rel=1e-6)
    assert standard_error(scores) < 1e-7


@given(
    count=st.integers(1, 80),
    window=st.integers(1, 20),
    batch_size=st.integers(1, 9),
    chunk=st.sampled_from([1, 30, 1 << 22]),
)
def test_a_bigram_is_scored_exactly(count: int, window: int, batch_size: int, chunk: int) -> None:
    model, tokens = random_bigram(), random_tokens(count)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logits, "_CHUNK_ELEMENTS", chunk)
        scores = score(model, tokens, window=window, batch_size=batch_size, bos_id=BOS)
    log_p = model.table.detach().double().log_softmax(-1)
    each = -log_p[torch.cat([torch.tensor([BOS]), tokens[:-1]]), tokens]
    expected = torch.stack([part.sum() for part in each.split(window)])
    torch.testing.assert_close(scores.nll, expected, rtol=1e-6, atol=1e-6)
    assert scores.nll.dtype == torch.float64
    assert scores.tokens.tolist() == [len(part) for part in each.split(window)]
    full, tail = divmod(count, window)
    sizes = [min(batch_size, full - start) for start in range(0, full, batch_size)]
    assert model.batches == [(size, window) for size in sizes] + [(1, tail)] * (tail > 0)


def test_scores_belong_to_no_graph_and_to_no_inference_mode() -> None:
    scores = score(random_bigram(), random_tokens(20), window=8, batch_size=4, bos_id=BOS)
    assert not scores.nll.requires_grad
    assert not scores.nll.is_inference()
    assert scores.seconds > 0


def test_every_part_of_a_model_gets_its_mode_back() -> None:
    model = random_bigram()
    frozen = nn.Dropout()
    model.add_module("frozen", frozen)
    model.train()
    frozen.eval()
    score(model, random_tokens(20), window=8, batch_size=4, bos_id=BOS)
    assert model.modes == [False, False]
    assert (model.training, frozen.training) == (True, False)
    model.eval()
    score(model, random_tokens(20), window=8, batch_size=4, bos_id=BOS)
    assert not model.training


def test_a_model_gets_its_mode_back_after_an_error() -> None:
    model = Bigram(torch.full((VOCABULARY, VOCABULARY), math.nan)).train()
    with pytest.raises(InputError):
        score(model, random_tokens(20), window=8, batch_size=4, bos_id=BOS)
    assert model.training


def test_progress_gives_the_scores_so_far() -> None:
    steps: list[Scores] = []
    model, tokens = random_bigram(), random_tokens(37)
    scores = score(model, tokens, window=5, batch_size=3, bos_id=BOS, on_batch=steps.append)
    assert [step.total_tokens for step in steps] == [15, 30, 35, 37]
    for step in steps:
        assert torch.equal(step.nll, scores.nll[: len(step.nll)])


@given(st.integers(1, 60), st.integers(1, 7), st.integers(1, 4), st.data())
def test_an_interrupted_scoring_continues_to_the_same_bits(
    count: int, window: int, batch_size: int, data: st.DataObject
) -> None:
    steps: list[Scores] = []
    model, tokens = random_bigram(), random_tokens(count)
    setting: dict[str, Any] = {"window": window, "batch_size": batch_size, "bos_id": BOS}
    whole = score(model, tokens, on_batch=steps.append, **setting)
    place = data.draw(st.integers(0, len(steps) - 1))
    model.batches.clear()
    found = score(model, tokens, done=steps[place], **setting)
    assert torch.equal(found.nll, whole.nll)
    assert torch.equal(found.tokens, whole.tokens)
    assert found.seconds >= steps[place].seconds
    # Nothing is scored twice.
    assert sum(rows * length for rows, length in model.batches) == (
        count - steps[place].total_tokens
    )


def test_scores_of_something_else_are_not_continued() -> None:
    steps: list[Scores] = []
    model, tokens = random_bigram(), random_tokens(37)
    score(model, tokens, window=5, batch_size=3, bos_id=BOS, on_batch=steps.append)
    with pytest.raises(InputError, match="not the first"):
        score(model, tokens, window=4, batch_size=3, bos_id=BOS, done=steps[0])
    with pytest.raises(InputError, match="not the first"):
        score(model, tokens[:10], window=5, batch_size=3, bos_id=BOS, done=steps[0])
    with pytest.raises(InputError, match="not whole batches of 2"):
        score(model, tokens, window=5, batch_size=2, bos_id=BOS, done=steps[0])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_logit_that_is_not_finite_is_located(value: float) -> None:
    table = torch.zeros(VOCABULARY, VOCABULARY)
    table[5, 3] = value
    tokens = torch.tensor([1] * 8 + [1, 5, 1, 1] + [1] * 4)
    message = f"logit {value} in window 2 at position 2 for token 3"
    with pytest.raises(InputError, match=message):
        score(Bigram(table), tokens, window=4, batch_size=2, bos_id=BOS)


def test_half_precision_logits_are_scored() -> None:
    half = score(random_bigram().bfloat16(), random_tokens(50), window=8, batch_size=4, bos_id=BOS)
    full = score(random_bigram(), random_tokens(50), window=8, batch_size=4, bos_id=BOS)
    assert half.total_nll == pytest.approx(full.total_nll, rel=0.02)


def test_wrong_logits_tokens_and_batch_sizes() -> None:
    tokens = random_tokens(20)
    with pytest.raises(ShapeError, match=r"must return \(B, N, V\)"):
        score(lambda ids: torch.zeros(3, 4), tokens, window=8, batch_size=4, bos_id=BOS)
    with pytest.raises(InputError, match="batch_size must be at least 1, not 0"):
        score(uniform, tokens, window=8, batch_size=0, bos_id=BOS)
    with pytest.raises(InputError, match="window length must be at least 1, not 0"):
        score(uniform, tokens, window=0, batch_size=4, bos_id=BOS)
    with pytest.raises(InputError, match="no token"):
        score(uniform, tokens[:0], window=8, batch_size=4, bos_id=BOS)
    with pytest.raises(DTypeError):
        score(uniform, tokens.float(), window=8, batch_size=4, bos_id=BOS)


def test_tokens_outside_of_the_vocabulary() -> None:
    tokens = torch.tensor([1, VOCABULARY, 2])
    with pytest.raises(InputError, match="go from 1 to 7, but the model's go from 0 to 6"):
        score(uniform, tokens, window=8, batch_size=4, bos_id=BOS)
    model = random_bigram()
    vars(model)["config"] = SimpleNamespace(vocab_size=VOCABULARY)
    with pytest.raises(InputError, match="go from 0 to 7, but the model's go from 0 to 6"):
        score(model, tokens, window=8, batch_size=4, bos_id=BOS)
    assert model.batches == []


def test_scores_survive_json_bit_for_bit() -> None:
    scores = score(random_bigram(), random_tokens(101), window=8, batch_size=4, bos_id=BOS)
    again = Scores.from_dict(json.loads(json.dumps(scores.as_dict())))
    assert torch.equal(again.nll, scores.nll)
    assert torch.equal(again.tokens, scores.tokens)
    assert again.seconds == scores.seconds


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"nll": [1.0], "tokens": [1]},
        {"nll": ["x"], "tokens": [1], "seconds": 1},
        {"nll": [1.0, 2.0], "tokens": [1], "seconds": 1},
        {"nll": [], "tokens": [], "seconds": 1},
        {"nll": [math.nan], "tokens": [1], "seconds": 1},
        {"nll": [1.0], "tokens": [0], "seconds": 1},
    ],
)
def test_what_is_no_scores(content: dict[str, object]) -> None:
    with pytest.raises(InputError, match=r"scores must have|nll must be|not scores"):
        Scores.from_dict(content)


def test_scores_have_their_dtypes() -> None:
    with pytest.raises(InputError, match="float64"):
        Scores(torch.ones(2), torch.ones(2, dtype=torch.int64), 1.0)


def test_totals_and_perplexities() -> None:
    scores = make_scores([2.0, 4.0, 1.0], [2, 4, 1])
    assert (scores.total_nll, scores.total_tokens) == (7.0, 7)
    assert perplexity_per_token(scores) == pytest.approx(math.e)
    assert perplexity_per_word(scores, 14) == pytest.approx(math.exp(0.5))
    assert standard_error(scores) == 0.0
    assert perplexity_per_word(make_scores([1e6], [1000]), 1) == math.inf
    with pytest.raises(InputError, match="words must be at least 1, not 0"):
        perplexity_per_word(scores, 0)


def test_the_standard_error_of_equal_windows_is_the_usual_one() -> None:
    nll = [3.0, 5.0, 4.0, 8.0]
    expected = stats.sem([value / 2 for value in nll])
    assert standard_error(make_scores(nll, [2] * 4)) == pytest.approx(expected)


def test_one_window_has_no_spread() -> None:
    one = make_scores([2.0], [3])
    with pytest.raises(InputError, match="one window"):
        standard_error(one)
    with pytest.raises(InputError, match="one window"):
        paired_change(one, one)


def test_identical_scores_change_by_exactly_zero() -> None:
    scores = score(random_bigram(), random_tokens(101), window=8, batch_size=4, bos_id=BOS)
    assert paired_change(scores, scores) == Change(0.0, 0.0, 0.0)


def test_the_change_is_that_of_the_perplexities() -> None:
    tokens = random_tokens(203)
    first, second = (
        score(random_bigram(seed), tokens, window=8, batch_size=4, bos_id=BOS) for seed in (0, 1)
    )
    change = paired_change(first, second)
    ratio = perplexity_per_token(second) / perplexity_per_token(first)
    assert change.delta_pct == pytest.approx(100 * (ratio - 1))
    assert change.low_pct < change.delta_pct < change.high_pct
    wider = paired_change(first, second, confidence=0.99)
    assert wider.low_pct < change.low_pct
    assert wider.high_pct > change.high_pct


@pytest.mark.parametrize(("windows", "confidence"), [(8, 0.95), (60, 0.95), (60, 0.8)])
def test_the_interval_covers_as_often_as_it_says(windows: int, confidence: float) -> None:
    generator = torch.Generator().manual_seed(20)
    counts = torch.full((windows,), 64)
    counts[-1] = 20
    truth, trials, covered = 0.003, 1500, 0
    for _ in range(trials):
        hardness = 3 + torch.randn(windows, dtype=torch.float64, generator=generator)
        noise = 0.02 * torch.randn(windows, dtype=torch.float64, generator=generator)
        reference = Scores(hardness * counts, counts, 1.0)
        scores = Scores((hardness + truth + noise) * counts, counts, 1.0)
        change = paired_change(reference, scores, confidence)
        covered += change.low_pct <= 100 * math.expm1(truth) <= change.high_pct
    assert covered / trials == pytest.approx(confidence, abs=0.02)


def test_pairing_takes_out_what_makes_windows_hard() -> None:
    generator = torch.Generator().manual_seed(3)
    counts = torch.full((50,), 32)
    hardness = 3 + torch.randn(50, dtype=torch.float64, generator=generator)
    reference = Scores(hardness * counts, counts, 1.0)
    scores = Scores((hardness + 0.01) * counts, counts, 1.0)
    change = paired_change(reference, scores)
    assert standard_error(scores) > 0.05
    assert change.high_pct - change.low_pct < 1e-9


@pytest.mark.parametrize(("freedom", "tolerance"), [(2, 0.04), (5, 0.002), (20, 1e-4), (999, 1e-8)])
def test_the_quantile_is_students(freedom: int, tolerance: float) -> None:
    value = perplexity._student_quantile(0.975, freedom)
    assert value == pytest.approx(stats.t.ppf(0.975, freedom), rel=tolerance)


def test_scores_of_other_windows_do_not_compare() -> None:
    scores = make_scores([1.0, 2.0], [4, 4])
    for other in (make_scores([1.0, 2.0], [4, 3]), make_scores([1.0, 2.0, 3.0], [4, 4, 4])):
        with pytest.raises(InputError, match="not of the same windows"):
            paired_change(scores, other)


@pytest.mark.parametrize("confidence", [0.0, 1.0, -1.0, 95.0, math.nan])
def test_an_impossible_confidence(confidence: float) -> None:
    scores = make_scores([1.0, 2.0], [4, 4])
    with pytest.raises(InputError, match="confidence must be between"):
        paired_change(scores, scores, confidence)


def test_the_divergence_of_bigrams_is_known() -> None:
    first, second = random_bigram(0), random_bigram(1)
    batches = [random_tokens(24, 1).view(2, 12), random_tokens(10, 2).view(1, 10)]
    log_p, log_q = (model.table.detach().double().log_softmax(-1) for model in (first, second))
    per_token = (log_p.exp() * (log_p - log_q)).sum(-1)
    seen = torch.cat([batch.flatten() for batch in batches])
    expected = float(per_token[seen].mean())
    assert kl_divergence(first, second, batches) == pytest.approx(expected, rel=1e-12)
    assert kl_divergence(first, first, batches) == 0.0
    assert first.training
    assert not any(first.modes)


def test_what_has_no_divergence() -> None:
    batch = random_tokens(8).view(1, 8)
    with pytest.raises(InputError, match="needs at least one batch"):
        kl_divergence(uniform, uniform, [])
    with pytest.raises(ShapeError, match="must have the same vocabulary"):
        kl_divergence(uniform, lambda ids: torch.zeros(*ids.shape, VOCABULARY + 1), [batch])
    with pytest.raises(InputError, match="window 0 at position 0"):
        kl_divergence(uniform, lambda ids: uniform(ids) * math.nan, [batch])


def test_a_protocol_is_written_in_full() -> None:
    protocol = Protocol("0123456789abcdef", "valid", 64, 1000, 600, 3000, 8)
    content = json.loads(json.dumps(protocol.as_dict()))
    assert content == {
        "tokenizer_hash": "0123456789abcdef",
        "split": "valid",
        "window": 64,
        "stride": 64,
        "tokens": 1000,
        "words": 600,
        "bytes": 3000,
        "batch_size": 8,
        "confidence": 0.95,
    }
    with pytest.raises(dataclasses.FrozenInstanceError):
        protocol.window = 2  # type: ignore[misc]


def test_bytes_of_wikitext_under_a_uniform_model(wikitext_dir: Path) -> None:
    text = load_corpus(wikitext_dir).valid
    tokens = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
    scores = score(
        lambda ids: torch.zeros(*ids.shape, 256), tokens, window=4096, batch_size=16, bos_id=BOS
    )
    assert scores.total_tokens == 1_121_681
    log_word = math.log(perplexity_per_word(scores, count_words(text)))
    assert log_word == pytest.approx(math.log(256) * 1_121_681 / 217_646)
