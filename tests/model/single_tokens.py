"""Small models that read token by token, with the engine or without."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bkcore import LanguageModel, QuantizationConfig
from bkcore.model.engine import use_engine
from bkcore.model.state import StreamState

MODES = ("ptq_int8", "ptq_int4", "mixed_precision")


def model(mode: str | None, *, seed: int = 0, **options: Any) -> Any:
    """A model with strong gates and barriers, quantized as `mode` says."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        sizes: dict[str, Any] = {"d_model": 24, "n_layers": 2, "num_experts": 4, "expert_size": 40}
        made = LanguageModel(50, **{**sizes, "num_heads": 4, "key_size": 7, **options}).eval()
        for parameter in made.parameters():
            nn.init.normal_(parameter, std=0.3)
        for layer in made.layers:
            layer.mixer.log_eta.data.sub_(4)
        if mode is not None:
            made.configure_quantization(QuantizationConfig(mode, observer="minmax"))
            made.calibrate_quantization([torch.randint(50, (4, 40))])
    return made


def read(made: Any, ids: Tensor, choice: str) -> tuple[Tensor, StreamState]:
    """Token by token, with the engine or without."""
    logits, state = [], made.first_state(len(ids))
    with torch.no_grad(), use_engine(choice):
        for token in ids.split(1, 1):
            output = made(token, cache_params=state)
            logits.append(output.logits)
            state = output.cache_params
    return torch.cat(logits, 1), state


def assert_same_bits(made: Any, ids: Tensor) -> None:
    (found, end), (expected, last) = (read(made, ids, choice) for choice in ("always", "never"))
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(end.seen, last.seen)
    for one, other in zip(end.layers, last.layers, strict=True):
        for x, y in zip(vars(one).values(), vars(other).values(), strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)


def tokens(*shape: int, seed: int = 1) -> Tensor:
    return torch.randint(50, shape, generator=torch.Generator().manual_seed(seed))
