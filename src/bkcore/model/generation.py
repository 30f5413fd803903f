"""Generation with a recurrent state: one token at a time, in constant memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from bkcore.errors import InputError
from bkcore.model.config import ResNetBKConfig
from bkcore.model.inputs import check_streams
from bkcore.model.mixer import ResolventMixer
from bkcore.model.state import StreamState


def first_state(
    model: nn.Module, config: ResNetBKConfig, batch: int, device: torch.device
) -> StreamState:
    """`ResNetBKForCausalLM.first_state`, with its token counts on a given device."""
    check_streams(config)
    mixers = (module for module in model.modules() if isinstance(module, ResolventMixer))
    layers = tuple(mixer.first_state(batch) for mixer in mixers)
    return StreamState(layers, torch.zeros(batch, dtype=torch.int64, device=device))


@torch.no_grad()
def stream(
    model: nn.Module,
    step: Callable[[Tensor, StreamState], tuple[Tensor, StreamState] | None],
    input_ids: Tensor,
    temperature: float,
    state: StreamState | None,
    generator: torch.Generator | None,
) -> Iterator[tuple[Tensor, StreamState]]:
    """`ResNetBKForCausalLM.stream`; `step` is the engine's, which may return None."""
    if not temperature >= 0:
        raise InputError(f"temperature must be at least 0, not {temperature}")
    output = model(input_ids, cache_params=state, use_cache=True)
    logits, state = output.logits, output.cache_params
    while True:
        logits = logits[:, -1].float()
        if temperature:
            chances = (logits / temperature).softmax(-1)
            token = chances.multinomial(1, generator=generator).squeeze(1)
        else:
            token = logits.argmax(-1)
        yield token, state
        # A token made here needs none of the checks of `forward`.
        found = step(token[:, None], state)
        if found is None:
            output = model(token[:, None], cache_params=state, use_cache=True)
            found = output.logits, output.cache_params
        logits, state = found


def next_inputs(
    config: ResNetBKConfig,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    cache_params: StreamState | None,
    use_cache: bool | None,
    is_first_iteration: bool,
) -> dict[str, Any]:
    """`ResNetBKForCausalLM.prepare_inputs_for_generation`."""
    if attention_mask is not None and not bool(attention_mask.all()):
        raise InputError(
            "generate() takes prompts of one length, without padding; "
            "group them by length, or generate one at a time"
        )
    if use_cache is False or not config.mixer_traits.streams:
        return {"input_ids": input_ids}
    new = input_ids if is_first_iteration or cache_params is None else input_ids[:, -1:]
    return {"input_ids": new, "cache_params": cache_params, "use_cache": True}
