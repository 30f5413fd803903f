"""The models of `bkcore bench engines`: of each size ours, and a dense Llama with as many weights.

Heads of the Llamas have 64 channels. Several share keys and values, as in Llama 3, which makes the
cache smaller and long contexts faster. In ResNet-BK, pairs of heads share keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from transformers import LlamaForCausalLM

from bkcore.bench.llama_cpp_engine import build_llama
from bkcore.bench.random_models import MODES, quantized, random_model
from bkcore.bench.rival_models import of_size
from bkcore.evaluation.checkpoints import load_float
from bkcore.model import ResNetBKForCausalLM

_BLOCK = 32
"""llama.cpp rounds so many numbers of a row together: every width is a multiple."""


class Format(NamedTuple):
    """A format of ours, and the one of llama.cpp that it is compared with; None if none is."""

    own: str
    rival: str | None


FORMATS = (Format("float32", None), Format("INT8", "Q8_0"), Format("INT4", "Q4_0"))


@dataclass(frozen=True)
class Size:
    """Models with about as many parameters.

    Attributes:
        name: begins the names of its rows.
        own: options of `LanguageModel` by the kind of model; None for a checkpoint.
        llama: sizes of the Llama, as `build_llama` takes them, but for its vocabulary, which is
            ours, and its hidden units, which are as many as make it as large as our first model.
        seconds: about how long it takes, for the progress bar.
    """

    name: str
    own: dict[str, dict[str, Any] | None]
    llama: dict[str, int]
    seconds: float


_LARGE = {
    "vocab_size": 16_384,
    "d_model": 768,
    "n_layers": 12,
    "num_heads": 12,
    "key_groups": 6,
    "key_size": 32,
}
SIZES = (
    Size(
        "4.9 M",
        {"shipped": None},
        {"width": 256, "layers": 5, "heads": 4, "cached_heads": 1},
        270.0,
    ),
    Size(
        "11 M",
        {"mixture": {"vocab_size": 4096, "d_model": 256, "n_layers": 4, "expert_size": 544}},
        {"width": 384, "layers": 6, "heads": 6, "cached_heads": 2},
        280.0,
    ),
    Size(
        "100 M",
        {
            "dense": {**_LARGE, "num_experts": 1, "experts_per_token": 1, "expert_size": 3392},
            "mixture": {**_LARGE, "expert_size": 424},
        },
        {"width": 768, "layers": 12, "heads": 12, "cached_heads": 3},
        2100.0,
    ),
)


def own_model(options: dict[str, Any] | None, checkpoint: Path) -> ResNetBKForCausalLM:
    """A float model with random weights, or without options that of a checkpoint."""
    return load_float(checkpoint)[0] if options is None else random_model(**options)


def in_format(model: ResNetBKForCausalLM, form: Format, tokens: Any) -> ResNetBKForCausalLM:
    """A float model as it is, or a copy that is quantized after calibration on tokens (B, N)."""
    mode = MODES.get(form.own)
    return model if mode is None else quantized(model, mode, tokens)


def llama_of_size(sizes: dict[str, int], vocab_size: int, parameters: int) -> LlamaForCausalLM:
    """The Llama whose number of parameters comes closest."""

    def make(blocks: int) -> LlamaForCausalLM:
        return build_llama(vocab_size, hidden=_BLOCK * blocks, **sizes)

    return of_size(make, parameters)
