"""The checkpoint in the repository: small, whole, and as good as its report says."""

import json
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from bkcore.cli import app
from bkcore.evaluation.checkpoints import load_checkpoint
from bkcore.evaluation.perplexity import perplexity_per_word, score
from bkcore.evaluation.samples import load_samples, samples_of
from bkcore.model import ResNetBKForCausalLM
from bkcore.text import (
    TokenWindows,
    count_words,
    encode,
    load_corpus,
    origin_of,
    tokenizer_hash,
)
from bkcore.training.recipe import read_recipe

ROOT = Path(__file__).resolve().parents[1]
CHECKPOINT = ROOT / "checkpoints" / "wikitext2"
REPORT = json.loads((CHECKPOINT / "training.json").read_text())

Loaded = tuple[ResNetBKForCausalLM, PreTrainedTokenizerFast]


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    """The model and its tokenizer, which no test changes."""
    return load_checkpoint(CHECKPOINT)


def test_it_is_small_and_half_precision() -> None:
    assert sum(path.stat().st_size for path in CHECKPOINT.iterdir()) <= 10_000_000
    assert json.loads((CHECKPOINT / "config.json").read_text())["dtype"] == "float16"


def test_it_is_what_the_recipe_makes(loaded: Loaded) -> None:
    recipe = read_recipe(ROOT / "configs" / "wikitext2.yaml")
    assert REPORT["recipe"] == recipe.as_dict()
    model, tokenizer = loaded
    assert {name: getattr(model.config, name) for name in recipe.model} == recipe.model
    assert model.config.n_seq == recipe.window
    assert tokenizer_hash(tokenizer) == REPORT["protocol"]["tokenizer_hash"]
    assert sum(parameter.numel() for parameter in model.parameters()) == REPORT["parameters"]


def test_it_generates_at_once(monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    result = CliRunner().invoke(app, ["generate", "--prompt", "The game was", "--tokens", "20"])
    assert result.exit_code == 0, result.output
    assert result.output.startswith("The game was")
    assert len(result.output.split()) > 6


@pytest.mark.slow
def test_it_is_as_good_as_its_report_says(wikitext_dir: Path, loaded: Loaded) -> None:
    """float16 moves each weight by at most 2^-11 of itself, some 1e-4 of the loss."""
    model, tokenizer = loaded
    text = load_corpus(wikitext_dir).valid
    scores = score(
        model,
        encode(tokenizer, text),
        window=REPORT["protocol"]["window"],
        batch_size=8,
        bos_id=tokenizer.bos_token_id,
    )
    found = perplexity_per_word(scores, count_words(text))
    assert abs(found / REPORT["best"]["eval_ppl_word"] - 1) < 1e-3


def test_it_knows_its_text_and_holds_what_it_is_calibrated_on(
    wikitext_dir: Path, loaded: Loaded
) -> None:
    model, tokenizer = loaded
    corpus = load_corpus(wikitext_dir)
    assert model.config.training_text == origin_of(corpus)
    windows = TokenWindows(encode(tokenizer, corpus.train), model.config.n_seq)
    samples = load_samples(CHECKPOINT, model.config.vocab_size)
    assert samples is not None
    assert torch.equal(samples, samples_of(windows))
