"""Token after token: what the model would make, and what ends it."""

from __future__ import annotations

import subprocess
import sys
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch

from bkcore_runtime import DTypeError, Engine, EngineError, InputError, ShapeError
from tests.model.helpers import edit
from tests.runtime.conftest import VOCABULARY, Save, Saved

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]


def greedy(model: Any, most: int, **options: Any) -> list[int]:
    """What transformers' generate appends to the prompt."""
    ids = torch.tensor([PROMPT])
    out = model.generate(ids, max_new_tokens=most, do_sample=False, pad_token_id=0, **options)
    return out[0, len(PROMPT) :].tolist()


def test_the_likeliest_tokens_are_those_of_the_model(saved: Saved) -> None:
    found = list(Engine(saved.folder).generate(PROMPT, 60))
    assert found == greedy(saved.model, 60)


@pytest.mark.parametrize("penalty", [0.5, 1.3, 5.0])
def test_repetition_is_penalized_as_in_transformers(save: Save, penalty: float) -> None:
    model, folder = save()
    found = list(Engine(folder).generate(PROMPT, 40, repetition_penalty=penalty))
    assert found == greedy(model, 40, repetition_penalty=penalty)


def test_a_stop_token_comes_and_nothing_after_it(save: Save) -> None:
    model, folder = save()
    whole = greedy(model, 60)
    stop = whole[10]
    expected = whole[: whole.index(stop) + 1]
    assert list(Engine(folder).generate(PROMPT, stop=[stop])) == expected
    edit(folder, "generation_config.json", eos_token_id=stop)
    engine = Engine(folder)
    assert list(engine.generate(PROMPT)) == expected
    assert list(engine.generate(PROMPT, 60, stop=())) == whole
    assert greedy(type(model).from_pretrained(folder).eval(), 60) == expected


def test_without_a_limit_it_goes_on(save: Save) -> None:
    tokens = Engine(save().folder).generate(PROMPT)
    assert len(list(islice(tokens, 500))) == 500


def test_a_seed_gives_the_same_tokens(saved: Saved) -> None:
    engine = Engine(saved.folder)
    draws = [list(engine.generate(PROMPT, 30, temperature=2.0, seed=n)) for n in (1, 1, 2, -1)]
    assert draws[0] == draws[1]
    assert draws[0] != draws[2] != draws[3]
    assert draws[3] == list(engine.generate(PROMPT, 30, temperature=2.0, seed=2**64 - 1))


def test_draws_have_the_probabilities_of_the_model(save: Save) -> None:
    """A deviation of four standard errors, as one of 61 tokens has once in 260 tests."""
    engine = Engine(save().folder)
    logits = engine.read(engine.start(), [PROMPT])[0].astype(np.float64) / 1.5
    chances = np.exp(logits - logits.max())
    chances /= chances.sum()
    draws = [next(engine.generate(PROMPT, 1, temperature=1.5, seed=n)) for n in range(4000)]
    counts = np.bincount(draws, minlength=VOCABULARY)
    spread = np.sqrt(4000 * chances * (1 - chances))
    assert (np.abs(counts - 4000 * chances) <= 4 * spread + 1).all()


@pytest.mark.parametrize("option", [{"top_k": 1}, {"top_p": 0.0}, {"min_p": 1.0}])
def test_filters_that_leave_one_token(save: Save, option: dict[str, Any]) -> None:
    engine = Engine(save().folder)
    found = list(engine.generate(PROMPT, 30, temperature=3.0, seed=4, **option))
    assert found == list(engine.generate(PROMPT, 30))


def test_a_state_is_continued(save: Save) -> None:
    engine = Engine(save().folder)
    state = engine.start()
    tokens = engine.generate(PROMPT, state=state)
    first = list(islice(tokens, 20))
    assert state.seen.tolist() == [len(PROMPT) + 19]
    kept = state.copy()
    rest = list(islice(tokens, 20))
    assert list(engine.generate([first[-1]], 20, state=kept)) == rest
    assert list(engine.generate(PROMPT, 40)) == first + rest


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"prompt_ids": []}, ShapeError, r"must be \(N,\), N >= 1, not \(0,\)"),
        ({"prompt_ids": ()}, ShapeError, r"not \(0,\)"),
        ({"prompt_ids": [[]]}, ShapeError, r"not \(1, 0\)"),
        ({"prompt_ids": [True, 5]}, DTypeError, "not bool"),
        ({"prompt_ids": [5, np.True_]}, DTypeError, "not bool"),
        ({"prompt_ids": [1, 2.0]}, DTypeError, "not float64"),
        ({"prompt_ids": torch.ones(2, requires_grad=True)}, DTypeError, "prompt_ids cannot be"),
        ({"prompt_ids": np.zeros(0, int)}, ShapeError, r"must be \(N,\), N >= 1, not \(0,\)"),
        ({"prompt_ids": [[1]]}, ShapeError, r"not \(1, 1\)"),
        ({"prompt_ids": [VOCABULARY]}, InputError, f"token {VOCABULARY} is not in"),
        ({"prompt_ids": "text"}, DTypeError, "must be integers"),
        ({"max_new_tokens": 0}, InputError, "max_new_tokens must be at least 1, not 0"),
        ({"max_new_tokens": 1.0}, InputError, "max_new_tokens must be an integer, not 1.0"),
        ({"temperature": -0.1}, InputError, "temperature must be a number of at least 0"),
        ({"temperature": float("nan")}, InputError, "temperature must be"),
        ({"temperature": float("inf")}, InputError, "temperature must be"),
        ({"temperature": "hot"}, InputError, "temperature must be a number, not 'hot'"),
        ({"temperature": 10**400}, InputError, "temperature must be"),
        ({"top_k": -1}, InputError, "top_k must be at least 0"),
        ({"top_k": 1.5}, InputError, "top_k must be an integer"),
        ({"top_k": -(10**40)}, InputError, "top_k must be at least 0"),
        ({"top_p": 1.1}, InputError, "top_p must be from 0 to 1"),
        ({"min_p": -0.1}, InputError, "min_p must be from 0 to 1"),
        ({"repetition_penalty": 0}, InputError, "repetition_penalty must be a number above 0"),
        ({"seed": None}, InputError, "seed must be an integer, not None"),
        ({"seed": True}, InputError, "seed must be an integer"),
        ({"stop": [VOCABULARY]}, InputError, "stop"),
        ({"stop": 3}, InputError, "stop"),
        ({"stop": ["a"]}, InputError, "stop"),
    ],
)
def test_arguments_that_cannot_be(
    save: Save, options: dict[str, Any], error: type[Exception], match: str
) -> None:
    """They are refused by the call itself, not when the first token is asked for."""
    with pytest.raises(error, match=match):
        Engine(save().folder).generate(**{"prompt_ids": PROMPT, **options})


def test_numbers_may_be_those_of_numpy(save: Save) -> None:
    engine = Engine(save().folder)
    plain = engine.generate(PROMPT, 9, temperature=0.5, seed=3, stop=[60])
    numpy = engine.generate(
        np.array(PROMPT, np.int32),
        np.int64(9),  # type: ignore[arg-type]
        temperature=np.float32(0.5),  # type: ignore[arg-type]
        seed=np.int64(3),  # type: ignore[arg-type]
        stop=np.array([60]),  # type: ignore[arg-type]
    )
    assert list(plain) == list(numpy)


def test_a_huge_top_k_keeps_all(save: Save) -> None:
    engine = Engine(save().folder)
    found = [list(engine.generate(PROMPT, 20, temperature=2.0, top_k=k)) for k in (0, 10**40)]
    assert found[0] == found[1]


def test_a_batch_is_not_continued(save: Save) -> None:
    engine = Engine(save().folder)
    with pytest.raises(ShapeError, match="one sequence, not 2"):
        engine.generate(PROMPT, state=engine.start(2))


def test_the_state_of_something_else_is_not_continued(save: Save) -> None:
    """The call itself refuses it."""
    engine, other = Engine(save().folder), Engine(save(key_size=5).folder)
    with pytest.raises(ShapeError, match="other sizes"):
        engine.generate(PROMPT, state=other.start())
    with pytest.raises(ShapeError, match="other sizes"):
        next(other.generate(PROMPT, state=engine.start()))
    model = save().model
    theirs: Any = model(torch.tensor([PROMPT]), use_cache=True).cache_params
    with pytest.raises(DTypeError, match=r"not StreamState; Engine\.resume\(state\.layers"):
        engine.generate(PROMPT, state=theirs)
    with pytest.raises(DTypeError, match=r"Engine\.start made, not dict"):
        engine.read({}, [PROMPT])  # type: ignore[arg-type]


WITHOUT_NUMPY = """
import sys
sys.modules["numpy"] = None
from bkcore_runtime import Engine, InputError
engine = Engine(sys.argv[1])
for ids in ([], (), range(0), [True, 5], [2**70], [5000], [[1]]):
    try:
        engine.generate(ids)
    except (InputError, TypeError) as error:
        print(type(error).__name__)
print(list(engine.generate([1, 2], 3)) == list(engine.generate(range(1, 3), 3)))
"""


def test_lists_are_checked_without_numpy(save: Save) -> None:
    command = [sys.executable, "-c", WITHOUT_NUMPY, str(save().folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    shapes, types = ["ShapeError"] * 3, ["DTypeError"] * 2
    assert done.stdout.split() == [*shapes, *types, "InputError", "InputError", "True"]


def test_logits_that_are_not_finite_choose_nothing(save: Save) -> None:
    engine = Engine(save().folder)
    state = engine.start()
    broken = engine.resume(
        [layer._replace(g=np.full_like(layer.g, np.nan)) for layer in state.layers], state.seen
    )
    with pytest.raises(EngineError, match="NaN or infinity"):
        next(engine.generate(PROMPT, state=broken))
