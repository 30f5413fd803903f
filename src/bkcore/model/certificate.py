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
        error: float64 (B, N, 2, D): the distance between Re and Im of the core's decoded output
            (divided by what is remembered) and the same output without codes, for the same inputs.
        bound: float64 (B, N, 2, D): a proved upper bound of `error`.
        clipped: how many numbers lay outside the range of the codes, by quantizer name.
    """

    layer: int
    error: Tensor
    bound: Tensor
    clipped: dict[str, int]


@torch.no_grad()
def core_certificates(model: QuantizationLifecycle, input_ids: Tensor) -> list[CoreCertificate]:
    """Measure and bound the error of the quantized core of every layer on some text.

    The float inputs of a layer are the queries, keys, values, gates and barriers that reach its
    quantizers in the quantized model. They have passed through the quantized layers before it, so
    the certificate says what one core adds, not how far off the logits are.

    Both error and bound compare with exact arithmetic on these inputs (the error up to float64
    round-off). The core's parameters count as exact, and so do the hoppings and potentials that
    float64 computes from gates and barriers. Codes, clipping and the core's float32 arithmetic are
    all included.

    Args:
        model: a `ResNetBKForCausalLM`, quantized or in quantization-aware training.
        input_ids: integers in [0, vocab_size), (B, N); texts that begin with their first token.

    Returns:
        One certificate per layer, first layer first.

    Raises:
        LifecycleError: the model's core does not run quantized.
        ShapeError, DTypeError: `input_ids` is not an integer tensor (B, N).
    """
    if model.quantization_state not in (QuantizationState.TRAINING, QuantizationState.QUANTIZED):
        raise LifecycleError(
            f"the core runs in float (the model's state is {model.quantization_state.value}), so "
            "it has no quantization error to certify; calibrate and quantize the model first"
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
    """A ball around x / w^power, from balls around x (B, N, H, U) and w > 0 (B, N, H).

    Let m be the centre of w's ball, s its radius and f = (m / (m - s))^power. Then
    `|w^-power - m^-power|` is at most `(f - 1) m^-power`: w^-power is convex and decreasing, so the
    smallest w moves it furthest.
    """
    scale = memory.centre[..., None] ** -power
    least = (memory.centre - memory.radius).clamp(min=0)[..., None]
    grown = (memory.centre[..., None] / least) ** power
    centre = ball.centre * scale
    radius = ball.radius * scale * grown + centre.abs() * (grown - 1)
    return Enclosure(centre, (radius + 32 * UNIT * centre.abs()) * (1 + 32 * UNIT))
