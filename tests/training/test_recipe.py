"""Recipes: what is read, and that every mistake is named before any work."""

import os
from pathlib import Path

import pytest

from bkcore.errors import InputError
from bkcore.training.recipe import read_recipe

MINIMAL = "training:\n  steps: 10\n  batch_size: 4\n  learning_rate: 5e-3\n"


def recipe(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_what_is_left_out_has_defaults(tmp_path: Path) -> None:
    found = read_recipe(recipe(tmp_path, MINIMAL))
    assert found.schedule.learning_rate == 0.005
    assert (found.vocab_size, found.window, found.model) == (4096, 256, {})


def test_every_section_is_taken(tmp_path: Path) -> None:
    text = MINIMAL + (
        "  window: 64\n  seed: 3\n  patience: 2\n"
        "tokenizer: {vocab_size: 512}\nmodel: {d_model: 32, norm_eps: 1e-2}\n"
    )
    found = read_recipe(recipe(tmp_path, text))
    assert (found.window, found.seed, found.schedule.patience) == (64, 3, 2)
    assert found.vocab_size == 512
    assert found.model == {"d_model": 32, "norm_eps": 0.01}


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", r"the section 'training' lacks \['batch_size', 'learning_rate', 'steps'\]"),
        ("[1, 2]", "must be a mapping from names to values"),
        ("a: [", "is not YAML"),
        (MINIMAL + "optimizer: {}\n", r"has no \['optimizer'\]"),
        (MINIMAL + "  step: 3\n", r"training has no \['step'\]; it takes .*'steps'"),
        (MINIMAL + "model: {d_modle: 3}\n", r"model has no \['d_modle'\]; it takes .*'d_model'"),
        (MINIMAL + "model: {vocab_size: 3}\n", r"model has no \['vocab_size'\]"),
        (MINIMAL + "model: {quantization: {}}\n", r"model has no \['quantization'\]"),
        (MINIMAL + "model: {d_model: 0}\n", "d_model must be a positive integer, not 0"),
        (MINIMAL + "model: {d_model: 2.5}\n", "d_model must be an integer, not 2.5"),
        (MINIMAL + "model: {chunked_loss: 1}\n", "chunked_loss must be true or false, not 1"),
        (MINIMAL + "model: {norm_eps: wide}\n", "norm_eps must be a number, not 'wide'"),
        (MINIMAL + "model: 3\n", "model must be a mapping from names to values, not 3"),
        (MINIMAL + "tokenizer: {vocab_size: 100}\n", "vocab_size must be .* at least 257"),
        (MINIMAL + "  window: 1\n", "window must be an integer of at least 2, not 1"),
        (MINIMAL + "  seed: -1\n", "seed must be an integer of at least 0"),
        (MINIMAL.replace("10", "ten"), "steps must be a positive integer, not 'ten'"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, text: str, complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        read_recipe(recipe(tmp_path, text))


def test_a_recipe_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        read_recipe(tmp_path / "none.yaml")


def test_shipped_recipes_are_recipes() -> None:
    shipped = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
    assert shipped
    for path in shipped:
        read_recipe(path)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("a: &a [1]\nb: *a", "takes no aliases"),
        ("a: 2001-99-99", "is not YAML"),
        ("a: !!python/object/apply:os.system [ls]", "is not YAML"),
        ("[" * 50_000, "nested too deeply"),
        ("a: " + "9" * 5000, "is not YAML"),
    ],
)
def test_what_a_stranger_may_write(tmp_path: Path, text: str, complaint: str) -> None:
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(InputError, match=complaint):
        read_recipe(tmp_path / "recipe.yaml")


def test_a_pipe_is_no_recipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "recipe.yaml")
    with pytest.raises(InputError, match="not a regular file"):
        read_recipe(tmp_path / "recipe.yaml")
