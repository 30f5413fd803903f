"""Long sequences: the loss in chunks, activation checkpointing, memory that grows as N."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments

from bkcore.errors import InputError
from bkcore.evaluation import perplexity
from bkcore.evaluation.perplexity import kl_divergence, score
from bkcore.model import loss as loss_module
from bkcore.model.layers import TokenEmbedding
from bkcore.model.loss import IGNORED, next_token_loss

TRAINABLE = [(None, "float"), ("qat_int8", "training"), ("qat_int4", "training")]


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
    assert head.weight.grad.any()
    head.requires_grad_(False)
    hidden.requires_grad_()
    next_token_loss(head, hidden, labels, 6).backward()
    assert hidden.grad.any()


def test_no_label_gives_nan_as_in_transformers():
    head, labels = TokenEmbedding(6, 4), torch.full((1, 5), IGNORED)
    assert next_token_loss(head, torch.randn(1, 5, 4), labels, 6).isnan()


# ---- the model -----------------------------------------------------------------------------


def gradients(model, **inputs) -> dict[str, Tensor]:
    model.zero_grad()
    model(**inputs).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


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
    with pytest.raises(InputError, match="nothing to return without labels"):
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
    options = {"window": 64, "batch_size": 2, "bos_id": 0}
    whole = score(lambda ids: model(ids).logits, text, **options)
    monkeypatch.setattr(perplexity, "_CHUNK_ELEMENTS", 10 * 61)
    rows = []
    model.embedding.logits = lambda hidden: (
        rows.append(len(hidden)) or type(model.embedding).logits(model.embedding, hidden)
    )
    pieces = score(model, text, **options)
    assert rows == [*[10] * 12, 8, 10, 10, 2]
    torch.testing.assert_close(pieces.nll, whole.nll, rtol=1e-5, atol=0)
    assert torch.equal(pieces.tokens, whole.tokens)
    own = kl_divergence(model, lambda ids: model(ids).logits, [text[None]])
    assert own == pytest.approx(0, abs=1e-8)


# ---- activation checkpointing --------------------------------------------------------------


def checkpointed(model):
    twin = copy.deepcopy(model)
    twin.gradient_checkpointing_enable({"use_reentrant": False})
    return twin


@pytest.mark.parametrize("form", TRAINABLE)
def test_checkpointing_changes_no_bit_of_a_gradient(build, tokens, form):
    model = build(*form).train()
    ids = tokens(3, 40)
    twin = checkpointed(model)
    calls = []
    for layer in twin.layers:
        layer.mixer.register_forward_hook(lambda *_: calls.append(1))
    own = gradients(twin, input_ids=ids, labels=ids)
    assert len(calls) == 2 * len(twin.layers), "nothing was computed again"
    true = gradients(model, input_ids=ids, labels=ids)
    assert own.keys() == true.keys()
    assert all(torch.equal(own[name], true[name]) for name in true)


def test_the_trainer_checkpoints(build, tokens, tmp_path):
    """`gradient_checkpointing=True` reaches the same weights, bit for bit."""
    items = [{"input_ids": row, "labels": row} for row in tokens(8, 16)]
    found = []
    for wanted in (False, True):
        model = build()
        calls = []
        model.layers[0].mixer.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        arguments = TrainingArguments(
            output_dir=tmp_path,
            use_cpu=True,
            max_steps=2,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            gradient_checkpointing=wanted,
            gradient_checkpointing_kwargs={"use_reentrant": False},
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        Trainer(model, arguments, train_dataset=items).train()
        assert len(calls) == (8 if wanted else 4)
        found.append(dict(model.named_parameters()))
    plain, twin = found
    assert all(torch.equal(plain[name], twin[name]) for name in plain)


def test_checkpointing_repeats_random_numbers(build, tokens):
    """A layer that draws, such as one with dropout, draws the same again."""

    def add_dropout(model):
        for layer in model.layers:
            layer.mixer.register_forward_hook(lambda _, __, out: (F.dropout(out[0], 0.3), out[1]))
        return model

    model = build().train()
    ids = tokens(2, 30)
    found = []
    for each in (add_dropout(checkpointed(model)), add_dropout(copy.deepcopy(model))):
        torch.manual_seed(3)
        found.append(gradients(each, input_ids=ids, labels=ids))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[1])
    torch.manual_seed(4)
    other = gradients(add_dropout(copy.deepcopy(model)), input_ids=ids, labels=ids)
    assert not all(torch.equal(other[name], found[1][name]) for name in other)


def test_checkpointing_keeps_less(build, tokens):
    """Bytes that the graph saves for the backward pass."""
    model, ids = build(), tokens(1, 256)

    def saved_bytes(model) -> int:
        sizes = {}

        def pack(tensor: Tensor) -> Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = model.train()(ids, labels=ids).loss
        assert loss.requires_grad
        return sum(sizes.values())

    assert saved_bytes(checkpointed(model)) < 0.4 * saved_bytes(model)
