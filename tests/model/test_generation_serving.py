"""Many sequences at once: in one batch, and in many threads."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from bkcore.model import ResNetBKForCausalLM, StreamState

MODES = ["ptq_int8", "ptq_int4", "mixed_precision"]


@torch.inference_mode()
def greedy(model: ResNetBKForCausalLM, prompt: Tensor, count: int) -> list[int]:
    """The `count` likeliest next tokens, one after the other."""
    output = model(prompt, use_cache=True)
    found = []
    for _ in range(count):
        token = output.logits[:, -1].argmax(-1, keepdim=True)
        found.append(int(token))
        output = model(token, cache_params=output.cache_params)
    return found


@pytest.mark.parametrize("mode", MODES)
@torch.inference_mode()
def test_sequences_come_and_go_in_one_batch(build, tokens, mode):
    model = build(mode, "quantized")
    prompts = [tokens(1, length) for length in (3, 17, 40, 90)]
    alone = [greedy(model, prompt, 12) for prompt in prompts]

    outputs = [model(prompt, use_cache=True) for prompt in prompts]
    state = StreamState.batch([output.cache_params for output in outputs[:3]])
    logits = torch.cat([output.logits[:, -1] for output in outputs[:3]])
    rows, found = [0, 1, 2], [list[int]() for _ in range(4)]
    for step in range(16):
        if step == 4:  # the last one joins
            state = StreamState.batch([state, outputs[3].cache_params])
            logits = torch.cat((logits, outputs[3].logits[:, -1]))
            rows.append(3)
        if step == 12:  # the first three have enough
            keep = torch.tensor([rows.index(3)])
            state, logits, rows = state.select(keep), logits[keep], [3]
        next_tokens = logits.argmax(-1)
        for row, token in zip(rows, next_tokens.tolist(), strict=True):
            found[row].append(token)
        output = model(next_tokens[:, None], cache_params=state)
        state, logits = output.cache_params, output.logits[:, -1]
    assert found == alone


@pytest.mark.parametrize("mode", MODES)
def test_threads_do_not_disturb_each_other(build, tokens, mode):
    model = build(mode, "quantized")
    prompts = [tokens(1, length) for length in (1, 5, 30, 70, 200, 11)]
    alone = [greedy(model, prompt, 20) for prompt in prompts]
    together = threading.Barrier(len(prompts))

    def serve(prompt: Tensor) -> list[list[int]]:
        together.wait()
        return [greedy(model, prompt, 20) for _ in range(3)]

    with ThreadPoolExecutor(len(prompts)) as pool:
        for found, expected in zip(pool.map(serve, prompts), alone, strict=True):
            assert found == [expected] * 3
