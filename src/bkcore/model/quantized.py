"""Which weights of the language model are quantized, and their passage from form to form."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from bkcore.model.mixer import CoreQuantizers, Phase, ResolventMixer
from bkcore.model.moe import Expert
from bkcore.quantization.config import Part, QuantizationConfig
from bkcore.quantization.gptq import InputMoments, pack_weight_by_moments
from bkcore.quantization.linear import QuantizedEmbedding, QuantizedLinear
from bkcore.quantization.weights import (
    HalfWeight,
    PackedWeight,
    TrainableWeight,
    pack_weight,
    search_weight_scales,
)

_LINEARS: dict[type[nn.Module], tuple[Part, tuple[str, ...]]] = {
    ResolventMixer: ("core", ("in_proj", "out_proj")),
    Expert: ("expert", ("up", "down")),
}


def quantizable(model: nn.Module) -> Iterator[tuple[nn.Module, str, Part]]:
    """(owner, attribute, part) of every weight matrix that a mode quantizes.

    The routers stay float: they hold half a percent of the weights and decide the routing.
    """
    for module in list(model.modules()):
        for kind, (part, names) in _LINEARS.items():
            if isinstance(module, kind):
                yield from ((module, name, part) for name in names)
        if isinstance(getattr(module, "embedding", None), nn.Module):
            yield module, "embedding", "head"


def attach_core_quantizers(
    model: nn.Module, config: QuantizationConfig, *, learnable: bool
) -> None:
    """Give every mixer fresh quantizers for its activations."""
    for mixer in _mixers(model):
        sizes = (mixer.heads, mixer.keys, mixer.width)
        quantizers = CoreQuantizers(*sizes, config, learnable=learnable)
        mixer.quantizers = quantizers.to(mixer.log_eta.device).train(mixer.training)


def set_phase(model: nn.Module, phase: Phase) -> None:
    """Tell every mixer's quantizers what to do."""
    for quantizers in core_quantizers(model):
        quantizers.phase = phase


def core_quantizers(model: nn.Module) -> list[CoreQuantizers]:
    """The quantizers of all mixers, first layer first."""
    return [mixer.quantizers for mixer in _mixers(model) if mixer.quantizers is not None]


def attach_moments(
    model: nn.Module, config: QuantizationConfig
) -> list[tuple[nn.Module, InputMoments]]:
    """Give every layer whose weights will compensate for their errors empty `moments`.

    They are part of the layer, and go with it when it is quantized.

    Returns:
        The layers with their moments.
    """
    pairs = []
    for owner, name, part in quantizable(model):
        if config.compensates(part):
            layer = getattr(owner, name)
            layer.moments = InputMoments(layer.weight.shape[1]).to(layer.weight.device)
            pairs.append((layer, layer.moments))
    return pairs


def input_moments(model: nn.Module) -> list[InputMoments]:
    """The moments of all layers that have them."""
    return [module for module in model.modules() if isinstance(module, InputMoments)]


def drop_moments(model: nn.Module) -> None:
    """Forget the moments of all layers."""
    for module in model.modules():
        moments = getattr(module, "moments", None)
        if isinstance(moments, InputMoments):
            moments.unwatch()
            del module.moments


def make_trainable(model: nn.Module, config: QuantizationConfig) -> None:
    """Replace float layers by layers that train through their codes."""
    for owner, name, part in list(quantizable(model)):
        weight = getattr(owner, name).weight.detach()
        bits, group_size = _format(config, part, weight.shape[1])
        scales = search_weight_scales(weight, bits, group_size, not config.per_channel)
        _replace(owner, name, TrainableWeight.from_float(weight, scales, bits, group_size))


def make_packed(model: nn.Module, config: QuantizationConfig) -> None:
    """Replace float or trainable layers by packed ones."""
    for owner, name, part in list(quantizable(model)):
        layer = getattr(owner, name)
        if isinstance(layer.weight, TrainableWeight):
            _replace(owner, name, layer.weight.pack())
        else:
            _replace(owner, name, _packed(layer, config, part))


def make_empty(model: nn.Module, config: QuantizationConfig, *, trainable: bool) -> None:
    """Give a freshly built float model the layers of a trainable or packed one, to load into."""
    for owner, name, part in list(quantizable(model)):
        rows, columns = getattr(owner, name).weight.shape
        bits, group_size = _format(config, part, columns)
        if bits == 16:
            _replace(owner, name, HalfWeight((rows, columns)))
        else:
            kind = TrainableWeight if trainable else PackedWeight
            _replace(owner, name, kind((rows, columns), bits, group_size))


def _packed(layer: nn.Module, config: QuantizationConfig, part: Part) -> PackedWeight | HalfWeight:
    weight = layer.get_parameter("weight").detach()
    bits, group_size = _format(config, part, weight.shape[1])
    if bits == 16:
        return HalfWeight.from_float(weight)
    if config.compensates(part):
        moments = layer.get_submodule("moments")
        assert isinstance(moments, InputMoments)
        return pack_weight_by_moments(weight, moments, bits, group_size, not config.per_channel)
    return pack_weight(weight, bits, group_size, not config.per_channel)


def _format(config: QuantizationConfig, part: Part, columns: int) -> tuple[int, int]:
    """Bits and group size of a weight with this many columns: INT8 has a scale per row."""
    bits = config.weight_bits(part)
    return bits, min(config.group_size, columns) if bits == 4 else columns


def _replace(
    owner: nn.Module, name: str, weight: PackedWeight | TrainableWeight | HalfWeight
) -> None:
    is_embedding = isinstance(getattr(owner, name), nn.Embedding | QuantizedEmbedding)
    device = next(getattr(owner, name).parameters()).device
    layer: QuantizedEmbedding | QuantizedLinear
    if is_embedding:
        layer = QuantizedEmbedding(weight)
    elif isinstance(weight, HalfWeight):
        raise TypeError("only the embedding can be stored in float16")
    else:
        layer = QuantizedLinear(weight)
    setattr(owner, name, layer.to(device).train(owner.training))


def _mixers(model: nn.Module) -> Iterator[ResolventMixer]:
    return (module for module in model.modules() if isinstance(module, ResolventMixer))


def storage_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers as they are held now."""
    tensors: list[Tensor] = [*model.parameters(), *model.buffers()]
    return sum(t.numel() * t.element_size() for t in tensors)
