"""The receipt of a quantized model: what quantization did to every tensor, ready for JSON.

Everything in it is measured; nothing is copied from what a mode promises. Bits and sizes come from
the actual layers, errors from the weights before and after, and the kernel is the product that
PyTorch dispatched when the layer was called.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from bkcore.deprecated import moved_names
from bkcore.model import conversion
from bkcore.model.certificate import CoreCertificate
from bkcore.model.core_quantizers import CoreQuantizers
from bkcore.model.mixer import Features, ResolventMixer
from bkcore.model.moe import MixtureOfExperts, of_all_processes
from bkcore.quantization.config import QuantizationConfig
from bkcore.quantization.linear import QuantizedEmbedding
from bkcore.quantization.quantizers import GroupWiseQuantizer
from bkcore.quantization.weights import HalfWeight, PackedWeight, TrainableWeight

Receipt = dict[str, Any]
"""Fields: see `of_quantized`."""

_ROWS = 32  # of the input that shows which kernel a layer runs

_FLOAT_PRODUCTS = {
    *("aten::mm", "aten::addmm", "aten::bmm", "aten::linear"),
    "bkcore::dense_product",
}
_PRODUCTS = {*_FLOAT_PRODUCTS, "aten::_int_mm"}

__getattr__ = moved_names(__name__)


def start_counting(model: nn.Module) -> None:
    """Start counting the tokens that reach the experts; quantizers count their own."""
    for module in model.modules():
        if isinstance(module, MixtureOfExperts) and module.router is not None:
            module.calibration_load = module.new_count()


def of_calibration(model: nn.Module) -> Receipt:
    """Stop counting, and add up the counts of all processes.

    Returns:
        `calibration`: by name, the tokens that reached each expert, each quantizer of the core,
        the mixers' projections and the embedding.
    """
    seen: dict[str, int] = {}
    for name, quantizer in _named_quantizers(model):
        seen[name] = quantizer.values_seen // quantizer.num_channels
        mixer = name.partition(".quantizers.")[0]
        seen |= dict.fromkeys((f"{mixer}.in_proj", f"{mixer}.out_proj"), seen[name])
    seen["embedding"] = max(seen.values())
    for path, module in model.named_modules():
        if isinstance(module, MixtureOfExperts):
            load = [seen["embedding"]]
            if module.calibration_load is not None:
                load = of_all_processes(module.calibration_load).tolist()
            for number, tokens in enumerate(load):
                expert = f"{path}.experts.{number}"
                seen |= dict.fromkeys((f"{expert}.up", f"{expert}.down"), tokens)
            module.calibration_load = None
    return {"calibration": seen}


def float_weights(model: nn.Module) -> dict[str, Tensor]:
    """The float weights that will be packed, by the names of their layers."""
    weights = {slot.name: slot.layer.weight for slot in conversion.quantizable(model)}
    return {
        name: (weight.weight if isinstance(weight, TrainableWeight) else weight).detach()
        for name, weight in weights.items()
    }


def of_quantized(
    model: nn.Module, config: QuantizationConfig, before: dict[str, Tensor], calibration: Receipt
) -> Receipt:
    """The receipt of a model whose weights were just packed.

    Args:
        model: the quantized model.
        config: how it was quantized.
        before: its float weights before packing, from `float_weights`. In QAT these are the
            trained float weights from which the codes are computed.
        calibration: from `of_calibration`; empty if unknown.

    Returns:
        `quantization`, the fields of the configuration; `calibration` as given; `weights`,
        `activations` and `float`, one entry per tensor; and an empty `cores`, which `of_cores`
        fills. In an entry, `calibration_tokens` is the number of tokens that reached the tensor,
        None if unknown; `clipping_rate` is the fraction of values outside the range of the codes,
        which saturate; `relative_error` of a weight is the norm of the difference over the norm of
        the weight.
    """
    seen = calibration.get("calibration", {})
    return {
        "quantization": config.to_dict(),
        "calibration": seen,
        "weights": [
            _weight_entry(slot, before[slot.name], config) | _tokens(seen, slot.name)
            for slot in conversion.quantizable(model)
        ],
        "activations": [
            _activation_entry(name, quantizer, config) | _tokens(seen, name)
            for name, quantizer in _named_quantizers(model)
        ],
        "float": list(_float_entries(model)),
        "cores": [],
    }


def of_cores(certificates: Sequence[CoreCertificate]) -> Receipt:
    """The errors of the cores on part of the calibration data, and their certified bounds.

    Returns:
        `cores`, with these fields for each layer: `layer`, its number; `tokens`, how many it was
        measured on; `error` and `bound`, the means of the error and of its certified bound over Re
        and Im of all outputs; `worst`, the largest ratio of error to bound, at most 1; and
        `clipped`, how many numbers lay outside the range of the codes, by quantizer.
    """
    tiny = torch.finfo(torch.float64).tiny  # where the bound is 0, the error is 0 too
    return {
        "cores": [
            {
                "layer": each.layer,
                "tokens": each.error.shape[0] * each.error.shape[1],
                "error": float(each.error.mean()),
                "bound": float(each.bound.mean()),
                "worst": float((each.error / each.bound.clamp(min=tiny)).max()),
                "clipped": each.clipped,
            }
            for each in certificates
        ]
    }


def problems(receipt: Receipt) -> list[str]:
    """Where a receipt differs from what its mode promises, one sentence per tensor.

    It lists weights that are too small to be quantized, and all `surprises`.
    """
    config = QuantizationConfig.from_dict(receipt["quantization"])
    small = [entry for entry in receipt["weights"] if _is_small(entry)]
    return [*(_too_small(entry["name"], config) for entry in small), *surprises(receipt)]


def surprises(receipt: Receipt) -> list[str]:
    """Where a receipt differs from what its mode and `min_size` lead to, one sentence per tensor.

    It lists weights whose bits differ from the mode's; quantized weights whose product runs in
    float; tensors that stayed float without a documented reason; and experts and quantizers that no
    calibration data reached.
    """
    config = QuantizationConfig.from_dict(receipt["quantization"])
    found = []
    for entry in receipt["weights"]:
        asked = config.weight_bits(entry["part"], entry["name"])
        if _is_small(entry):
            continue
        if entry["bits"] != asked:
            found.append(f"{entry['name']} has {entry['bits']} bits instead of {asked}")
        elif asked < 16 and _FLOAT_PRODUCTS & set(entry["kernel"].split(" + ")):
            found.append(f"{entry['name']} is multiplied in float ({entry['kernel']})")
    seen = [*receipt["weights"], *receipt["activations"]]
    found += problems_of_calibration({entry["name"]: entry["calibration_tokens"] for entry in seen})
    for entry in receipt["float"]:
        if entry["reason"] is None:
            found.append(f"{entry['name']} stayed float, which no mode intends")
    return found


def problems_of_calibration(seen: dict[str, int | None]) -> list[str]:
    """Those of `problems` that the calibration's token counts already show."""
    return [
        f"no calibration data reached {name}, as far as the record shows"
        for name, tokens in seen.items()
        if not tokens
    ]


def problems_of_size(model: nn.Module, config: QuantizationConfig) -> list[str]:
    """Those of `problems` that a float model already shows: weights too small to quantize."""
    return [
        _too_small(slot.name, config)
        for slot in conversion.quantizable(model)
        if config.weight_bits(slot.part, slot.name, slot.size)
        != config.weight_bits(slot.part, slot.name)
    ]


def _is_small(entry: dict[str, Any]) -> bool:
    return entry["bits"] == 16 and "reason" in entry


def _too_small(name: str, config: QuantizationConfig) -> str:
    return f"{name} stayed float16 ({_small(config)}; --min-size 0)"


def _small(config: QuantizationConfig) -> str:
    return f"small: fewer numbers than min_size, {config.min_size:,}"


def _tokens(seen: dict[str, int], name: str) -> dict[str, int | None]:
    return {"calibration_tokens": seen.get(name)}


def _weight_entry(
    slot: conversion.Slot, before: Tensor, config: QuantizationConfig
) -> dict[str, Any]:
    layer = slot.layer
    entry = {
        "name": slot.name,
        "part": slot.part,
        "shape": list(before.shape),
        "kernel": _kernel(layer),
        "bytes": conversion.storage_bytes(layer),
    }
    weight = layer.weight
    if isinstance(weight, HalfWeight):
        if config.weight_bits(slot.part, slot.name) != 16:
            entry["reason"] = _small(config)
        return entry | {
            "bits": 16,
            "scheme": "float16",
            "relative_error": _relative_error(before, weight.packed.float()),
        }
    if not isinstance(weight, PackedWeight):
        return entry | {"bits": 8 * before.element_size(), "scheme": "float"}
    # An incomplete last group has its own scale, like all others.
    scales = weight.scales().repeat_interleave(weight.group_size, 1)[:, : before.shape[1]]
    return entry | {
        "bits": weight.bits,
        "scheme": "symmetric",
        "levels": "even" if weight.bits == 8 else "companded",
        "group_size": weight.group_size,
        "scales": weight.stored_scales.numel() if config.per_channel else 1,
        "range_method": "learned" if config.is_qat else "mse",
        "rounding": "gptq" if weight.tokens_seen else "nearest",
        "clipping_rate": weight.clipped(before).double().mean().item(),
        "relative_error": _relative_error(before, weight.codes() * scales),
    }


def _relative_error(before: Tensor, after: Tensor) -> float:
    norm = before.double().norm().item()
    return (after.double() - before.double()).norm().item() / norm if norm else 0.0


def _levels(quantizer: GroupWiseQuantizer, config: QuantizationConfig) -> str:
    if quantizer.table is None:
        return "even"
    return "learned" if config.is_qat else "fitted"


def _activation_entry(
    name: str, quantizer: GroupWiseQuantizer, config: QuantizationConfig
) -> dict[str, Any]:
    scales = quantizer.scales
    return {
        "name": name,
        "bits": quantizer.bits,
        "scheme": "symmetric" if quantizer.symmetric else "asymmetric",
        "levels": _levels(quantizer, config),
        "channels": quantizer.num_channels,
        "scales": quantizer.num_groups,
        "smallest_scale": scales.min().item(),
        "largest_scale": scales.max().item(),
        "range_method": quantizer.method,
        "clipping_rate": quantizer.clipped_share if quantizer.values_seen else None,
        "bytes": conversion.storage_bytes(quantizer),
    }


def _named_quantizers(model: nn.Module) -> Iterator[tuple[str, GroupWiseQuantizer]]:
    for name, module in model.named_modules():
        if isinstance(module, GroupWiseQuantizer):
            yield name, module


def _float_entries(model: nn.Module) -> Iterator[dict[str, Any]]:
    """Every tensor that belongs neither to a quantizable weight nor to the core's quantizers."""
    known = {id(slot.layer) for slot in conversion.quantizable(model)}
    inside = {
        id(part)
        for module in model.modules()
        if id(module) in known or isinstance(module, CoreQuantizers)
        for part in module.modules()
    }
    for path, module in model.named_modules():
        if id(module) in inside:
            continue
        tensors = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        for name, tensor in tensors:
            yield {
                "name": f"{path}.{name}",
                "dtype": str(tensor.dtype).removeprefix("torch."),
                "shape": list(tensor.shape),
                "bytes": tensor.numel() * tensor.element_size(),
                "reason": _reason(path, module),
            }


def _reason(path: str, module: nn.Module) -> str | None:
    """Why the parameters of a module stay float in every mode; None if there is no reason."""
    if isinstance(module, nn.RMSNorm):
        return "norm: a number for each channel"
    if isinstance(module, nn.Conv1d):
        return "short convolution: a few taps for each channel"
    if isinstance(module, Features):
        return "features: three numbers for each channel"
    if isinstance(module, ResolventMixer):
        return "chain of a head: a number for each head"
    if isinstance(module, nn.Linear) and path.endswith(".router"):
        return "router: small, and decides which experts serve"
    return None


class _Products(TorchDispatchMode):
    """Records the matrix products that are dispatched, and kernels that are not PyTorch's own."""

    def __init__(self) -> None:
        super().__init__()
        self.names: dict[str, None] = {}  # in order, each once

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().partition(".")[0]
        if name in _PRODUCTS or not name.startswith(("aten::", "prim")):
            self.names[name] = None
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def _kernel(layer: nn.Module) -> str:
    """The product that a layer runs."""
    call = layer.logits if isinstance(layer, QuantizedEmbedding) else layer
    weight: Any = layer.weight
    device = next(iter([*layer.parameters(), *layer.buffers()])).device
    with _Products() as products:
        call(torch.ones(_ROWS, weight.shape[1], device=device))
    return " + ".join(products.names)
