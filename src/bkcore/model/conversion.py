"""Which weights of the language model are quantized, and how they change from form to form."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn

from bkcore.arguments import did_you_mean
from bkcore.errors import CalibrationError, InputError
from bkcore.model.core_quantizers import CoreQuantizers, Phase
from bkcore.model.mixer import ResolventMixer
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
from bkcore.reading import shown

_LINEARS: dict[type[nn.Module], tuple[Part, tuple[str, ...]]] = {
    ResolventMixer: ("core", ("in_proj", "out_proj")),
    Expert: ("expert", ("up", "down")),
}


class Slot(NamedTuple):
    """A layer whose weight matrix a mode quantizes.

    Attributes:
        owner, attribute: the module that holds the layer, and its name there.
        part: where in the model it is.
        name: the layer's name in the model, the key in `QuantizationConfig.tensor_bits`.
    """

    owner: nn.Module
    attribute: str
    part: Part
    name: str

    @property
    def layer(self) -> Any:
        """The layer that is currently there."""
        return getattr(self.owner, self.attribute)

    @property
    def size(self) -> int:
        """How many numbers its weight has, however they are stored."""
        rows, columns = self.layer.weight.shape
        return int(rows * columns)


def quantizable(model: nn.Module) -> Iterator[Slot]:
    """Every layer whose weight matrix a mode quantizes.

    The routers stay float: they hold half a percent of the weights and decide the routing.
    """
    for path, module in list(model.named_modules()):
        prefix = f"{path}." if path else ""
        for kind, (part, attributes) in _LINEARS.items():
            if isinstance(module, kind):
                yield from (Slot(module, name, part, prefix + name) for name in attributes)
        if isinstance(getattr(module, "embedding", None), nn.Module):
            yield Slot(module, "embedding", "head", f"{prefix}embedding")


def check_tensor_bits(model: nn.Module, config: QuantizationConfig) -> None:
    """Raise `InputError` if `config` gives bits to a weight that the model does not have."""
    known = {slot.name for slot in quantizable(model)}
    unknown = sorted(set(config.tensor_bits or ()) - known)
    if unknown:
        raise InputError(
            f"tensor_bits names {shown(unknown)}, but the model has no quantizable weight "
            "of that name; bkcore.model.conversion.quantizable(model) lists the names"
            f"{did_you_mean(unknown, known)}"
        )


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
    """Give empty `moments` to every layer whose weight rounding compensates for its errors.

    They belong to the layer, and disappear with it when it is quantized.

    Returns:
        The layers with their moments.
    """
    pairs = []
    for slot in quantizable(model):
        if config.compensates(slot.part, slot.name, slot.size):
            layer = slot.layer
            layer.moments = InputMoments(layer.weight.shape[1]).to(layer.weight.device)
            pairs.append((layer, layer.moments))
    return pairs


def keep_moments(model: nn.Module, config: QuantizationConfig) -> None:
    """Drop the moments of a calibrated model that a change of bits has made useless.

    Raises:
        CalibrationError: if the change needs moments that were not collected.
    """
    for slot in quantizable(model):
        if config.compensates(slot.part, slot.name, slot.size):
            _moments(slot)
        elif hasattr(slot.layer, "moments"):
            del slot.layer.moments


def input_moments(model: nn.Module) -> list[InputMoments]:
    """The moments of all layers that have them."""
    return [module for module in model.modules() if isinstance(module, InputMoments)]


def make_trainable(model: nn.Module, config: QuantizationConfig) -> None:
    """Replace float layers by trainable ones, which compute with the values of their codes."""
    for slot in list(quantizable(model)):
        weight = slot.layer.weight.detach()
        bits, group_size = _format(config, slot, weight.shape[1])
        scales = search_weight_scales(weight, bits, group_size, not config.per_channel)
        _replace(slot, TrainableWeight.from_float(weight, scales, bits, group_size))


def make_packed(model: nn.Module, config: QuantizationConfig) -> None:
    """Replace float or trainable layers by packed ones."""
    for slot in list(quantizable(model)):
        _replace(slot, _packed(config, slot))


@contextmanager
def packed_alone(
    model: nn.Module, config: QuantizationConfig, names: Collection[str]
) -> Iterator[None]:
    """Pack the named weights of a float model inside a with block, and leave the others float."""
    slots = [slot for slot in quantizable(model) if slot.name in names]
    layers = [slot.layer for slot in slots]
    try:
        for slot in slots:
            _replace(slot, _packed(config, slot))
        yield
    finally:
        for slot, layer in zip(slots, layers, strict=True):
            setattr(slot.owner, slot.attribute, layer)


def make_empty(model: nn.Module, config: QuantizationConfig, *, trainable: bool) -> None:
    """Replace a new float model's layers by empty trainable or packed ones, to load into."""
    for slot in list(quantizable(model)):
        rows, columns = slot.layer.weight.shape
        bits, group_size = _format(config, slot, columns)
        if bits == 16:
            _replace(slot, HalfWeight((rows, columns)))
        else:
            kind = TrainableWeight if trainable else PackedWeight
            _replace(slot, kind((rows, columns), bits, group_size))


def _packed(config: QuantizationConfig, slot: Slot) -> PackedWeight | HalfWeight:
    weight = slot.layer.weight
    if isinstance(weight, TrainableWeight):
        return weight.pack()
    weight = weight.detach()
    bits, group_size = _format(config, slot, weight.shape[1])
    if bits == 16:
        return HalfWeight.from_float(weight)
    if config.compensates(slot.part, slot.name, slot.size):
        moments = _moments(slot)
        return pack_weight_by_moments(weight, moments, bits, group_size, not config.per_channel)
    return pack_weight(weight, bits, group_size, not config.per_channel)


def _moments(slot: Slot) -> InputMoments:
    moments = getattr(slot.layer, "moments", None)
    if not isinstance(moments, InputMoments):
        raise CalibrationError(
            f"{slot.name} was not calibrated for INT4 weights; give it 4 bits before calibration, "
            'or choose weight_rounding="nearest"'
        )
    return moments


def _format(config: QuantizationConfig, slot: Slot, columns: int) -> tuple[int, int]:
    """Bits and group size of a weight with this many columns; INT8 has one scale per row."""
    bits = config.weight_bits(slot.part, slot.name, slot.size)
    return bits, min(config.group_size, columns) if bits == 4 else columns


def _replace(slot: Slot, weight: PackedWeight | TrainableWeight | HalfWeight) -> None:
    is_embedding = isinstance(slot.layer, nn.Embedding | QuantizedEmbedding)
    device = next(slot.layer.parameters()).device
    layer = (QuantizedEmbedding if is_embedding else QuantizedLinear)(weight)
    setattr(slot.owner, slot.attribute, layer.to(device).train(slot.owner.training))


def _mixers(model: nn.Module) -> Iterator[ResolventMixer]:
    return (module for module in model.modules() if isinstance(module, ResolventMixer))


def storage_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers as they are held now."""
    tensors: list[Tensor] = [*model.parameters(), *model.buffers()]
    return sum(t.numel() * t.element_size() for t in tensors)
