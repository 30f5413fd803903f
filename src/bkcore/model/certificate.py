"""The error of every quantized core of a language model, and a bound that provably covers it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from bkcore.core import resolvent_attention
from bkcore.core.attention import AttentionInputs
from bkcore.core.enclosures import UNIT, Enclosure, attention_enclosure
from bkcore.errors import LifecycleError
from bkcore.kernels.recall import over_memory
from bkcore.model.mixer import ResolventMixer
from bkcore.quantization.lifecycle import QuantizationLifecycle, QuantizationState
from bkcore.quantization.quantizers import GroupWiseQuantizer


@dataclass(frozen=True)
class CoreCertificate:
    """What quantization did to the core of one layer, given its float inputs.

    Attributes:
        layer: from 0.
        error: float64 (B, N, 2, D): how far Re and Im of what the core found (over what is
            remembered, decoded) are from what it finds, without codes, for the same inputs.
        bound: float64 (B, N, 2, D): what `error` cannot exceed.
        clipped: how many numbers lay beyond the codes, by the name of the quantizer.
    """

    layer: int
    error: Tensor
    bound: Tensor
    clipped: dict[str, int]


@torch.no_grad()
def core_certificates(model: QuantizationLifecycle, input_ids: Tensor) -> list[CoreCertificate]:
    """Measure and bound the error of the quantized core of every layer on some text.

    The float inputs of a layer are queries, keys, values, gates and barriers as they come to the
    quantizers in the quantized model, hence behind the quantized layers before: the certificate
    says what one core adds, not how far the logits are off. Both the error and the bound compare
    with exact arithmetic on those inputs (the error to the round-off of float64); the hoppings and
    potentials that float64 makes of gates and barriers, and the core's parameters, are taken
    for exact. Codes, clipping and the float32 of the core are included.

    Args:
        model: a `ResNetBKForCausalLM`, quantized or in quantization-aware training.
        input_ids: integers in [0, vocab_size), (B, N); texts that begin with their first token.

    Returns:
        A certificate a layer, first layer first.

    Raises:
        LifecycleError: the model's core does not run quantized.
        ShapeError, DTypeError: `input_ids` is not an integer tensor (B, N).
    """
    if model.quantization_state not in (QuantizationState.TRAINING, QuantizationState.QUANTIZED):
        raise LifecycleError(
            f"the core runs in float, the model is {model.quantization_state.value}: there is no "
            "error of quantization to certify; calibrate and quantize it first"
        )
    return certify(model, input_ids)


@torch.no_grad()
def certify(model: nn.Module, input_ids: Tensor) -> list[CoreCertificate]:
    """`core_certificates` of a model whose core runs quantized, whatever its state is called."""
    mixers = [module for module in model.modules() if isinstance(module, ResolventMixer)]
    with _seen_by(mixers) as seen:
        model(input_ids)
    return [_certify(n, *x) for n, x in enumerate(zip(mixers, seen, strict=True))]


@contextmanager
def _seen_by(mixers: list[ResolventMixer]) -> Iterator[list[Tensor]]:
    """A list to which every mixer adds its input."""
    seen: list[Tensor] = []
    hooks = [m.register_forward_pre_hook(lambda _, args: seen.append(args[0])) for m in mixers]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _certify(layer: int, mixer: ResolventMixer, x: Tensor) -> CoreCertificate:
    state = mixer.first_state(len(x))
    inputs, _, _ = mixer.core_inputs(x, state)
    used = mixer.quantized_inputs(inputs)
    parts, _ = mixer.recall(used, (state.g, state.psi))
    found = mixer.quantized_found(parts).double()

    exact = mixer.attention_inputs(inputs, torch.float64)
    attended = mixer.attention_inputs(used, used.value.dtype)
    eta = mixer.log_eta.exp().double()
    _, real, imag, memory = attention_enclosure(exact, attended, eta)
    imag = Enclosure(imag.centre / eta[:, None], imag.radius / eta[:, None])
    bounds = [
        _over_power(ball, memory, power).bound(part.unflatten(-1, (mixer.heads, -1)))
        for ball, power, part in zip((real, imag), (0.5, 1.5), found.unbind(2), strict=True)
    ]
    out, g, _ = resolvent_attention(*AttentionInputs(*(t.double() for t in exact)), eta)
    truth = [part.flatten(2) for part in over_memory(out.real, out.imag, g.imag / eta, eta)]
    assert mixer.quantizers is not None
    named = {**inputs._asdict(), "found.real": parts[0], "found.imag": parts[1]}
    return CoreCertificate(
        layer,
        error=(found - torch.stack(truth, 2)).abs(),
        bound=torch.stack(bounds, 2).flatten(3),
        clipped={
            name: int(cast(GroupWiseQuantizer, mixer.quantizers.get_submodule(name)).clips(x).sum())
            for name, x in named.items()
        },
    )


def _over_power(ball: Enclosure, memory: Enclosure, power: float) -> Enclosure:
    """The ball around x / w^power, of balls around x (B, N, H, U) and w > 0 (B, N, H).

    With m the centre of w's ball, s its radius and f = (m / (m - s))^power, `|w^-power - m^-power|`
    is at most `(f - 1) m^-power`: the power is convex, so that the smaller w moves it further.
    """
    scale = memory.centre[..., None] ** -power
    least = (memory.centre - memory.radius).clamp(min=0)[..., None]
    grown = (memory.centre[..., None] / least) ** power
    centre = ball.centre * scale
    radius = ball.radius * scale * grown + centre.abs() * (grown - 1)
    return Enclosure(centre, (radius + 32 * UNIT * centre.abs()) * (1 + 32 * UNIT))
