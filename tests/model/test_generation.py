"""A model that reads token by token, from a state of fixed size."""

from __future__ import annotations

from itertools import islice

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from bkcore.errors import CheckpointError, InputError, ShapeError
from bkcore.model import StreamState
from tests.model.helpers import read

# Whole vectors of 32 numbers: in a ragged rest PyTorch rounds SiLU differently.
WHOLE = {"d_model": 64, "expert_size": 64, "key_size": 8, "num_heads": 4}


@torch.no_grad()
def test_token_by_token_is_the_parallel_pass(build, tokens, executed_form):
    model = build(*executed_form)
    ids = tokens(2, 50)
    logits, state = read(model, ids, list(range(1, 50)))
    assert state.seen.tolist() == [50, 50]
    whole = model(ids).logits
    assert torch.equal(logits.argmax(-1), whole.argmax(-1))
    # Float products of other shapes round differently; behind codes that is a step at most, and
    # most of the logits are the same.
    quantized = executed_form[1] != "float"
    close = torch.isclose(logits, whole, rtol=1e-4, atol=1e-4)
    assert close.double().mean() > (0.9 if quantized else 0.99999)


@torch.no_grad()
@pytest.mark.parametrize("mode", ["ptq_int8", "ptq_int4"])
def test_quantized_features_are_equal_code_for_code(build, tokens, mode):
    model = build(mode, "quantized", **WHOLE)
    ids = tokens(1, 300)
    found: list[list[Tensor]] = []
    for layer in model.layers:  # what leaves the core, on its way to the output projection
        layer.mixer.out_proj.register_forward_pre_hook(lambda _, args: found[-1].append(args[0]))
    found.append([])
    whole = model(ids).logits
    parallel = found[-1]
    found.append([])
    logits, _ = read(model, ids, list(range(1, 300)))
    count = len(parallel)
    for index, expected in enumerate(parallel):
        stepped = torch.cat(found[-1][index::count], 1)
        assert torch.equal(stepped, expected), index
    # Routers and the weights of experts are float.
    torch.testing.assert_close(logits, whole, rtol=1e-5, atol=1e-5)


@given(cuts=st.sets(st.integers(1, 39), max_size=6), seed=st.integers(0, 99))
@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@torch.no_grad()
def test_a_text_may_be_cut_anywhere(build, cuts, seed):
    model = build()
    ids = torch.randint(61, (2, 40), generator=torch.Generator().manual_seed(seed))
    logits, _ = read(model, ids, sorted(cuts))
    torch.testing.assert_close(logits, model(ids).logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_four_thousand_tokens(build, tokens):
    model = build(n_layers=1, **WHOLE)
    ids = tokens(1, 4096)
    logits, _ = read(model, ids, list(range(1, 4096)))
    whole = model(ids).logits
    assert torch.equal(logits.argmax(-1), whole.argmax(-1))
    torch.testing.assert_close(logits, whole, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("beams", [1, 3])
def test_generate_reads_every_token_once(build, tokens, beams):
    model = build()
    lengths: list[int] = []
    model.embedding.register_forward_hook(lambda _, args, __: lengths.append(args[0].shape[1]))
    prompt = tokens(2, 7).clamp(min=1)
    options = {"max_new_tokens": 6, "do_sample": False, "num_beams": beams, "pad_token_id": 0}
    options["attention_mask"] = torch.ones_like(prompt)
    streamed = model.generate(prompt, **options)
    assert lengths == [7, 1, 1, 1, 1, 1]
    lengths.clear()
    again = model.generate(prompt, use_cache=False, **options)
    assert lengths == [7, 8, 9, 10, 11, 12]
    assert torch.equal(streamed, again)


@torch.no_grad()
def test_generate_goes_on_from_a_state(build, tokens):
    model = build()
    text = tokens(1, 12).clamp(min=1)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    _, state = read(model, text[:, :8], [])
    whole = model.generate(text, attention_mask=torch.ones_like(text), **options)
    rest = text[:, 8:]
    resumed = model.generate(
        rest, attention_mask=torch.ones_like(rest), cache_params=state, **options
    )
    assert torch.equal(resumed, whole[:, 8:])


@torch.no_grad()
def test_stream_is_greedy_generation_and_can_be_left(build, tokens):
    model = build()
    prompt = tokens(2, 4)
    steps = list(islice(model.stream(prompt), 8))
    ids = torch.cat((prompt, torch.stack([token for token, _ in steps], 1)), 1)
    assert torch.equal(model(ids[:, :-1]).logits[:, 3:].argmax(-1), ids[:, 4:])
    token, state = steps[2]
    onward = [t for t, _ in islice(model.stream(token[:, None], state=state), 5)]
    assert torch.equal(torch.stack(onward, 1), ids[:, 7:])


def test_stream_samples_by_its_generator(build, tokens):
    model = build()
    prompt = tokens(1, 4)

    def draw(seed: int) -> list[int]:
        source = torch.Generator().manual_seed(seed)
        return [
            int(t) for t, _ in islice(model.stream(prompt, temperature=2.0, generator=source), 20)
        ]

    assert draw(1) == draw(1) != draw(2)
    with pytest.raises(InputError, match="temperature"):
        next(model.stream(prompt, temperature=-1.0))


def test_training_through_a_state(build, tokens):
    """The gradient of a text in two pieces is that of the whole text."""
    model = build().train()
    ids = tokens(2, 20)

    def gradients(cuts: list[int]) -> list[Tensor]:
        model.zero_grad()
        logits, _ = read(model, ids, cuts)
        logits.square().mean().backward()
        return [p.grad.clone() for p in model.parameters()]

    whole = gradients([])
    largest = max(x.abs().max().item() for x in whole)
    for got, want in zip(gradients([9]), whole, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-5 * largest)


def test_what_cannot_be_streamed_is_named(build, tokens, tmp_path):
    model = build()
    ids = tokens(2, 6)
    mask = torch.ones_like(ids)
    mask[0, -1] = 0
    with pytest.raises(InputError, match="would include the padding"):
        model(ids, attention_mask=mask, use_cache=True)
    with pytest.raises(InputError, match="cache_params has 3 sequences, but input_ids has 2"):
        model(ids, cache_params=model.first_state(3))
    other = build(key_size=3)
    with pytest.raises(ShapeError, match="different models"):
        StreamState.batch([model.first_state(), other.first_state()])
    for stranger in (other, build(value_size=2), build(conv_width=3), build(n_layers=1)):
        with pytest.raises(ShapeError, match="of another model"):
            model(ids, cache_params=stranger.first_state(2))
    with pytest.raises(InputError, match="at least one state"):
        StreamState.batch([])
    for mixer in ("convolution", "green"):
        with pytest.raises(InputError, match="keeps no state"):
            build(mixer=mixer)(ids, use_cache=True)
        with pytest.raises(InputError, match="keeps no state"):
            build(mixer=mixer).first_state()
    (tmp_path / "bad").write_bytes(b"nothing")
    for path in (tmp_path / "bad", tmp_path / "absent"):
        with pytest.raises(CheckpointError, match="not a saved state"):
            StreamState.load(path)
    with pytest.raises(CheckpointError, match="cannot write"):
        model.first_state().save(tmp_path / "no" / "folder")


@torch.no_grad()
def test_mixers_without_a_state_generate_all_the_same(build, tokens):
    prompt = tokens(1, 5).clamp(min=1)
    for mixer in ("convolution", "green"):
        model = build(mixer=mixer)
        out = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=3, do_sample=False,
            pad_token_id=0,
        )  # fmt: skip
        assert out.shape == (1, 8)


@torch.no_grad()
def test_generation_is_greedy_decoding(build, tokens, executed_form):
    model = build(*executed_form)
    prompt = tokens(2, 5).clamp(min=1)  # transformers takes token 0, the padding, for a mask
    generated = model.generate(prompt, max_new_tokens=6, do_sample=False, pad_token_id=0)
    ids = prompt
    for _ in range(6):
        ids = torch.cat((ids, model(ids).logits[:, -1].argmax(-1, keepdim=True)), dim=1)
    assert torch.equal(generated, ids)


def test_sampling_repeats_with_its_seed(build, tokens):
    model, prompt = build("ptq_int8", "quantized"), tokens(1, 3).clamp(min=1)
    texts = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        texts.append(model.generate(prompt, max_new_tokens=12, do_sample=True, pad_token_id=0))
    assert torch.equal(texts[0], texts[1])
    assert not torch.equal(texts[0], texts[2])


def test_generation_takes_a_mask_and_refuses_padding(build, tokens, executed_form):
    model, ids = build(*executed_form), tokens(2, 6).clamp(min=1)
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    mask = torch.ones_like(ids)
    expected = model.generate(ids, **options)
    assert torch.equal(model.generate(ids, attention_mask=mask, **options), expected)
    mask[0, -1] = 0
    with pytest.raises(InputError, match="one length"):
        model.generate(ids, attention_mask=mask, **options)
