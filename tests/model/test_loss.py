"""The loss of long sequences in chunks: the plain loss, in memory that grows as N."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from bkcore.errors import InputError
from bkcore.evaluation import logits
from bkcore.evaluation.perplexity import kl_divergence, score
from bkcore.model import loss as loss_module
from bkcore.model.layers import TokenEmbedding
from bkcore.model.loss import IGNORED, next_token_loss
from tests.model.helpers import TRAINABLE, gradients


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven rows a chunk, so that the shortest text takes several, the last one ragged."""
    monkeypatch.setattr(loss_module, "_CHUNK_ELEMENTS", 1)
    monkeypatch.setattr(loss_module, "_LEAST_ROWS", 7)


def plain_loss(head: TokenEmbedding, hidden: Tensor, labels: Tensor, count: int | None) -> Tensor:
    logits = head.logits(hidden)[:, :-1].flatten(0, 1)
    targets = labels[:, 1:].flatten()
    if count is None:
        return F.cross_entropy(logits, targets)
    return F.cross_entropy(logits, targets, reduction="sum") / count


@given(
    batch=st.integers(1, 3),
    length=st.integers(2, 20),
    vocabulary=st.integers(1, 9),
    ignored=st.floats(0, 0.8),
    count=st.none() | st.integers(1, 50),
    seed=st.integers(0, 1000),
)
def test_chunks_give_the_plain_loss_and_its_gradients(
    batch, length, vocabulary, ignored, count, seed
):
    torch.manual_seed(seed)
    head = TokenEmbedding(vocabulary, 5).double()
    hidden = torch.randn(batch, length, 5, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(vocabulary, (batch, length))
    labels[torch.rand(batch, length) < ignored] = IGNORED
    labels[0, 1] = 0  # at least one label
    inputs = (hidden, head.weight)
    found = next_token_loss(head, hidden, labels, vocabulary, count)
    wanted = plain_loss(head, hidden, labels, count)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-14)
    pairs = zip(
        torch.autograd.grad(3 * found, inputs),
        torch.autograd.grad(3 * wanted, inputs),
        strict=True,
    )
    for own, true in pairs:
        torch.testing.assert_close(own, true, rtol=1e-11, atol=1e-13)
    with torch.no_grad():
        assert torch.equal(next_token_loss(head, hidden, labels, vocabulary, count), found)


class Loss(torch.nn.Module):
    """The loss as a function of hidden states and the weight of its head."""

    def __init__(self, labels: Tensor) -> None:
        super().__init__()
        self.head, self.labels = TokenEmbedding(6, 4).double(), labels

    def forward(self, hidden: Tensor) -> Tensor:
        return next_token_loss(self.head, hidden, self.labels, 6)


def test_gradcheck():
    loss = Loss(torch.randint(6, (2, 9)))
    hidden = torch.randn(2, 9, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)

    def of_both(hidden: Tensor, weight: Tensor) -> Tensor:
        return torch.func.functional_call(loss, {"head.weight": weight}, (hidden,))

    assert torch.autograd.gradcheck(of_both, (hidden, weight))


def test_a_frozen_head_and_frozen_states():
    head = TokenEmbedding(6, 4)
    hidden = torch.randn(1, 9, 4)
    labels = torch.randint(6, (1, 9))
    next_token_loss(head, hidden, labels, 6).backward()
    assert head.weight.grad is not None
    assert head.weight.grad.any()
    head.requires_grad_(False)
    hidden.requires_grad_()
    next_token_loss(head, hidden, labels, 6).backward()
    assert hidden.grad is not None
    assert hidden.grad.any()


def test_no_label_gives_nan_as_in_transformers():
    head, labels = TokenEmbedding(6, 4), torch.full((1, 5), IGNORED)
    assert next_token_loss(head, torch.randn(1, 5, 4), labels, 6).isnan()


# ---- the model -----------------------------------------------------------------------------


@pytest.mark.parametrize("form", TRAINABLE)
@pytest.mark.parametrize("count", [None, 40])
def test_the_model_trains_on_the_same_loss_without_logits(build, tokens, form, count):
    model = build(*form).train()
    ids = tokens(3, 17)
    labels = ids.clone()
    labels[1, 4:9] = IGNORED
    given = {"input_ids": ids, "labels": labels, "num_items_in_batch": count}
    whole = model(**given, return_logits=True)
    chunked = model(**given, return_logits=False)
    assert whole.logits.shape == (3, 17, 61)
    assert chunked.logits is None
    torch.testing.assert_close(chunked.loss, whole.loss)
    own, true = (gradients(model, **given, return_logits=wanted) for wanted in (False, True))
    assert own.keys() == true.keys()
    largest = max(wanted.abs().max().item() for wanted in true.values())
    for name, wanted in true.items():
        # Sums in another order. Terms up to a thousand times their sum cancel behind the core, and
        # all of eta's: what is found is normalized.
        size = largest if name.endswith("log_eta") else wanted.abs().max().item()
        bound = 1e3 * torch.finfo(wanted.dtype).eps * size
        torch.testing.assert_close(own[name], wanted, rtol=0, atol=bound + 1e-12)


@torch.no_grad()
def test_when_logits_are_returned(build, tokens):
    model, ids = build(), tokens(2, 9)
    assert model(ids, labels=ids).logits is not None
    quiet = model(ids, labels=ids, return_logits=False)
    assert quiet.logits is None
    torch.testing.assert_close(quiet.loss, model(ids, labels=ids).loss)
    assert len(model(ids, labels=ids, return_logits=False, return_dict=False)) == 1
    model.train()
    assert model(ids, labels=ids).logits is not None
    model.config.chunked_loss = True
    assert model(ids, labels=ids).logits is None
    assert model(ids).logits is not None
    assert model.eval()(ids, labels=ids).logits is not None
    with pytest.raises(InputError, match="without labels leaves nothing to return"):
        model(ids, return_logits=False)


@torch.no_grad()
def test_logits_in_pieces(build, tokens, executed_form):
    model, ids = build(*executed_form), tokens(3, 11)
    pieces = list(model.iter_logits(ids, 7))
    assert [len(piece) for piece in pieces] == [7, 7, 7, 7, 5]
    torch.testing.assert_close(torch.cat(pieces), model(ids).logits.flatten(0, 1))


@torch.no_grad()
def test_scoring_never_holds_the_logits_of_a_long_window(build, tokens, executed_form, monkeypatch):
    model, text = build(*executed_form), tokens(150)
    options: dict[str, Any] = {"window": 64, "batch_size": 2, "bos_id": 0}
    whole = score(lambda ids: model(ids).logits, text, **options)
    monkeypatch.setattr(logits, "_CHUNK_ELEMENTS", 10 * 61)
    rows: list[int] = []
    head = model.embedding.logits

    def counted(hidden: torch.Tensor) -> torch.Tensor:
        rows.append(len(hidden))
        return head(hidden)

    monkeypatch.setattr(model.embedding, "logits", counted)
    pieces = score(model, text, **options)
    assert rows == [*[10] * 12, 8, 10, 10, 2]
    torch.testing.assert_close(pieces.nll, whole.nll, rtol=1e-5, atol=0)
    assert torch.equal(pieces.tokens, whole.tokens)
    own = kl_divergence(model, lambda ids: model(ids).logits, [text[None]])
    assert own == pytest.approx(0, abs=1e-8)
