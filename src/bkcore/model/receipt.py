"""The receipt of a quantized model: what was done to every one of its tensors, ready for JSON.

Nothing in it is taken from what a mode promises. Bits and sizes are those of the layers that are
there, errors are computed from the weights before and after, and the kernel is the product that
PyTorch dispatched when the layer was called.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from bkcore import manifest
from bkcore.errors import CheckpointError
from bkcore.model import conversion
from bkcore.model.certificate import CoreCertificate
from bkcore.model.mixer import CoreQuantizers, Features, ResolventMixer
from bkcore.model.moe import MixtureOfExperts, of_all_processes
from bkcore.outputs import to_json
from bkcore.quantization.config import QuantizationConfig
from bkcore.quantization.linear import QuantizedEmbedding
from bkcore.quantization.quantizers import GroupWiseQuantizer
from bkcore.quantization.weights import HalfWeight, PackedWeight, TrainableWeight
from bkcore.reading import parse_json, shown

Receipt = dict[str, Any]
"""Fields: see `of_quantized`."""

_ROWS = 32  # of the call that tells which kernel a layer runs

_FLOAT_PRODUCTS = {"aten::mm", "aten::addmm", "aten::bmm", "aten::linear"}
_PRODUCTS = {*_FLOAT_PRODUCTS, "aten::_int_mm"}


def start_counting(model: nn.Module) -> None:
    """Count from now on the tokens that reach the experts; quantizers count by themselves."""
    for module in model.modules():
        if isinstance(module, MixtureOfExperts) and module.router is not None:
            module.calibration_load = module.new_count()


def of_calibration(model: nn.Module) -> Receipt:
    """End the count, of all processes together.

    Returns:
        `calibration`, the tokens that reached each expert, each quantizer of the core, and the
        projections beside them and the embedding, by name.
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
    """The float weights that are going to be packed, by the names of their layers."""
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
        model: quantized.
        config: how.
        before: its weights before that, from `float_weights`. QAT's are those behind the codes.
        calibration: from `of_calibration`; empty if that is not known.

    Returns:
        `quantization`, the fields of the configuration; `calibration` as given; `weights`,
        `activations` and `float`, an entry for each tensor; and `cores`, empty, which `of_cores`
        fills. `calibration_tokens` in them are those that reached the tensor, None if that is not
        known. `clipping_rate` is the share of values beyond the range of the codes, which saturate.
        `relative_error` of a weight is the norm of the difference over that of the weight.
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
    """The errors of the cores on a part of the calibration data, and what bounds them.

    Returns:
        `cores`, for each layer: its number `layer`; `tokens` that it was measured on; the mean of
        the error and of its certified bound, `error` and `bound`, over Re and Im of all that was
        found; the largest quotient of the two, `worst`, at most 1; and `clipped`, how many
        numbers lay beyond the codes, by quantizer.
    """
    tiny = torch.finfo(torch.float64).tiny  # where a bound is 0 so is the error
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
    """What in a receipt is not as its mode promises, a sentence for each tensor.

    A weight is one if it has other bits than the mode names, for whatever reason, or if it has
    codes but its product runs in float. So is a tensor that stayed float without a documented
    reason, and an expert or a quantizer that no calibration data reached.
    """
    config = QuantizationConfig.from_dict(receipt["quantization"])
    found = []
    for entry in receipt["weights"]:
        asked = config.weight_bits(entry["part"], entry["name"])
        if entry["bits"] == 16 and "reason" in entry:
            found.append(_too_small(entry["name"], config))
        elif entry["bits"] != asked:
            found.append(f"{entry['name']} has {entry['bits']} bits instead of {asked}")
        elif asked < 16 and _FLOAT_PRODUCTS & set(entry["kernel"].split(" + ")):
            found.append(f"{entry['name']} is multiplied in float ({entry['kernel']})")
    seen = [*receipt["weights"], *receipt["activations"]]
    found += problems_of_calibration({entry["name"]: entry["calibration_tokens"] for entry in seen})
    for entry in receipt["float"]:
        if entry["reason"] is None:
            found.append(f"{entry['name']} stayed float, which no mode provides for")
    return found


def problems_of_calibration(seen: dict[str, int | None]) -> list[str]:
    """Those of `problems` that are known after calibration, from its tokens by tensor."""
    return [
        f"{name} was reached by no calibration data, or by none on record"
        for name, tokens in seen.items()
        if not tokens
    ]


def problems_of_size(model: nn.Module, config: QuantizationConfig) -> list[str]:
    """Those of `problems` that are known of a float model: weights too small for their mode."""
    return [
        _too_small(slot.name, config)
        for slot in conversion.quantizable(model)
        if config.weight_bits(slot.part, slot.name, slot.size)
        != config.weight_bits(slot.part, slot.name)
    ]


def _too_small(name: str, config: QuantizationConfig) -> str:
    return f"{name} stayed float16 ({_small(config)}; --min-size 0)"


def _small(config: QuantizationConfig) -> str:
    return f"small: fewer numbers than min_size, {config.min_size:,}"


def read(folder: Path) -> Receipt:
    """The receipt in a checkpoint's folder.

    Raises:
        CheckpointError: if there is no whole checkpoint, or it has no receipt: a float one, or one
            of a version that wrote none.
    """
    receipt = find(folder, manifest.verify(folder))
    if receipt is None or "weights" not in receipt:
        raise CheckpointError(
            f"the checkpoint {folder} has no receipt: it is not quantized, or was saved by a "
            "version that wrote none; bkcore quantize makes a quantized one from a float model"
        )
    return receipt


def find(folder: Path, digests: manifest.Digests) -> Receipt | None:
    """What a checkpoint with these digests says of its quantization; None if it says nothing.

    Raises:
        CheckpointError: if the file is not what `write` writes.
    """
    if manifest.RECEIPT not in digests:
        return None
    content = manifest.contents(folder, manifest.RECEIPT, digests)
    try:
        receipt = parse_json(content)
        _check(receipt)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{folder / manifest.RECEIPT} is not a receipt: {error}") from error
    return dict(receipt)


def write(receipt: Receipt, folder: Path) -> None:
    """Write a receipt into a folder; numbers that JSON has not are null, with the reason."""
    (folder / manifest.RECEIPT).write_text(to_json(receipt, indent=1), encoding="utf-8")


_NONE = (type(None),)
_INT, _TEXT, _NUMBER = (int,), (str,), (int, float, *_NONE)  # null for what JSON has not

_FIELDS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("name", "part", "kernel", "scheme", "levels", "rounding", "dtype"), _TEXT),
    **dict.fromkeys(("range_method", "reason"), _TEXT + _NONE),
    **dict.fromkeys(("bits", "bytes", "scales", "channels", "group_size"), _INT),
    **dict.fromkeys(("layer", "tokens", "steps"), _INT),
    "calibration_tokens": _INT + _NONE,
    **dict.fromkeys(("smallest_scale", "largest_scale", "error", "bound", "worst"), _NUMBER),
    **dict.fromkeys(("relative_error", "first_loss", "last_loss"), _NUMBER),
    "clipping_rate": _NUMBER,
    "shape": (list,),
    "clipped": (dict,),
    "distilled": (bool,),
}
"""The kinds of the fields of all entries."""

_NEEDED = {
    "weights": "name part shape kernel bytes bits scheme calibration_tokens",
    "activations": (
        "name bits scheme scales smallest_scale largest_scale range_method calibration_tokens"
    ),
    "float": "name shape bytes reason",
    "cores": "layer tokens error bound worst clipped",
    "training": "steps distilled first_loss last_loss",
}
"""What an entry of each section cannot go without."""


def _check(receipt: object) -> None:
    """Raise `ValueError` or `TypeError` unless this is what `of_quantized` gives."""
    if not isinstance(receipt, dict):
        raise TypeError(f"it is {shown(receipt)}")
    if "weights" in receipt:
        if "quantization" not in receipt or not receipt["weights"]:
            raise ValueError("it says nothing of the mode, or of no weight")
        receipt = {"activations": [], "float": [], **receipt}
    for section, content in receipt.items():
        if section == "quantization":
            if not isinstance(content, dict):
                raise TypeError(f"its quantization is {shown(content)}")
            QuantizationConfig.from_dict(content)
        elif section == "calibration":
            _check_counts(content)
        elif section in _NEEDED:
            entries = [content] if section == "training" else content
            if not isinstance(entries, list):
                raise TypeError(f"{section} is {shown(entries)}, not a list")
            for entry in entries:
                _check_entry(section, entry)


def _check_entry(section: str, entry: object) -> None:
    if not isinstance(entry, dict):
        raise TypeError(f"an entry of {section} is {shown(entry)}")
    missing = sorted(set(_NEEDED[section].split()) - entry.keys())
    if missing:
        raise ValueError(f"an entry of {section} lacks {missing}")
    for name, value in entry.items():
        kinds = _FIELDS.get(name, (object,))
        if not isinstance(value, kinds) or (isinstance(value, bool) and kinds == _INT):
            raise TypeError(f"{name} in {section} is {shown(value)}")
    sizes = entry.get("shape", [])
    if not all(type(size) is int and size > 0 for size in sizes):
        raise ValueError(f"a shape in {section} is {shown(sizes)}")
    if section == "weights" and len(sizes) != 2:
        raise ValueError(f"the shape of a weight is {shown(sizes)}")
    _check_counts(entry.get("clipped", {}))


def _check_counts(counts: object) -> None:
    if not isinstance(counts, dict) or not all(type(count) is int for count in counts.values()):
        raise TypeError(f"{shown(counts)} are not counts by name")


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
    # A ragged last group has a scale of its own, as all others.
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
    """Every tensor that is neither of a weight that modes name nor of the core's quantizers."""
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
    """Why the parameters of a module stay float in every mode; None where nothing says so."""
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
    """Notes the matrix products that are dispatched, and kernels that are not PyTorch's own."""

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
