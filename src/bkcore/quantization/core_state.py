"""The state dict of a standalone core: its contents, and the check that it fits a core.

Besides the quantizers' tensors it holds the lifecycle state, the configuration and the core as JSON
bytes (`_extra_state`). It holds only the zero points that `storage_bytes` counts: none for a
symmetric quantizer, one for a quantizer whose groups share it. State dicts of earlier versions,
with a zero point for every group, also load.

A state dict is checked before anything is loaded, so that a core takes all of it or nothing.
"""

from __future__ import annotations

import json
from typing import Any, Protocol

import torch
from torch import Tensor

from bkcore.core import BirmanSchwingerCore
from bkcore.errors import CheckpointError
from bkcore.quantization.affine import SCALE_DTYPE
from bkcore.quantization.complex_quantizer import ComplexQuantizer
from bkcore.quantization.config import QuantizationConfig
from bkcore.quantization.lifecycle import QuantizationState
from bkcore.quantization.quantizers import GroupWiseQuantizer

_EXTRA = "_extra_state"
_Expected = dict[str, tuple[tuple[int, ...], torch.dtype | None]]
"""Shape and dtype by name; None stands for any real floating dtype."""


class QuantizedCore(Protocol):
    """The parts of a `QuantizedBirmanSchwingerCore` that its state dict records."""

    core: BirmanSchwingerCore
    v_quantizer: GroupWiseQuantizer
    G_quantizer: ComplexQuantizer

    @property
    def quantization_state(self) -> QuantizationState: ...

    @property
    def quant_config(self) -> QuantizationConfig: ...


def encode(core: QuantizedCore) -> Tensor:
    """Lifecycle state, configuration and core as JSON bytes (uint8)."""
    fields = {"state": core.quantization_state.value, **_identity(core)}
    return torch.tensor(list(json.dumps(fields, allow_nan=False).encode()), dtype=torch.uint8)


def decode(core: QuantizedCore, state: Any) -> QuantizationState:
    """The lifecycle state in the result of `encode`, for a core like this one.

    Raises:
        CheckpointError: if it is of another core or configuration, or not such a result.
    """
    try:
        if not isinstance(state, Tensor) or state.dtype != torch.uint8 or state.ndim != 1:
            raise TypeError(f"{_EXTRA} must be a uint8 vector, not {_described(state)}")
        fields = json.loads(bytes(state.tolist()))
        restored = QuantizationState(fields.pop("state"))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"the state dict holds no quantization state: {error}") from error
    own = _identity(core)
    # Earlier versions wrote the configuration's value; PTQ modes never have tables.
    fields["nonuniform"] = core.quant_config.is_qat and fields.get("nonuniform")
    differing = {key: fields.get(key) for key in own if fields.get(key) != own[key]}
    if differing:
        raise CheckpointError(
            f"the state dict is of a core with {differing}, but this one has "
            f"{ ({key: own[key] for key in differing}) }; build it with the same options"
        )
    return restored


def reduce_zero_points(
    core: QuantizedCore, state_dict: dict[str, Any], prefix: str, _: Any
) -> None:
    """Keep in a state dict only the zero points that must be stored; a post hook of saving."""
    for name, quantizer in _quantizers(core).items():
        zero_points = state_dict.pop(f"{prefix}{name}.zero_points")
        if quantizer.distinct_zero_points:
            kept = zero_points[: quantizer.distinct_zero_points].clone()
            state_dict[f"{prefix}{name}.zero_points"] = kept


def check(
    core: QuantizedCore,
    state_dict: dict[str, Any],
    prefix: str,
    *_: Any,
) -> None:
    """Refuse a state dict that does not fit, and complete its zero points; a pre hook of loading.

    If it has no entry of the core, PyTorch reports what is missing.

    Raises:
        CheckpointError: if an entry is missing, unknown, or not what this core can hold.
    """
    entries = {k[len(prefix) :]: x for k, x in state_dict.items() if k.startswith(prefix)}
    if not entries:
        return
    calibrated = decode(core, entries.get(_EXTRA)).has_scales
    expected: _Expected = {}
    for name, quantizer in _quantizers(core).items():
        expected |= _expected(name, quantizer, entries)
    missing, unknown = expected.keys() - entries.keys(), entries.keys() - expected.keys() - {_EXTRA}
    if missing or unknown:
        raise CheckpointError(
            f"the core's state dict lacks {sorted(missing)} and has the unknown entries "
            f"{sorted(unknown)}; save and load all that core.state_dict() returns"
        )
    for name, (shape, dtype) in expected.items():
        _check_entry(name, entries[name], shape, dtype)
        if calibrated and name.endswith("stored_scales"):
            _check_scales(name, entries[name])
    for name, quantizer in _quantizers(core).items():
        key = f"{name}.zero_points"
        every = _every_zero_point(key, entries.get(key), quantizer)
        state_dict[prefix + key] = every


def _identity(core: QuantizedCore) -> dict[str, Any]:
    """The settings that must agree for scales to have the same meaning."""
    names = ("n_seq", "epsilon", "energy", "hopping", "onsite", "causal")
    fields = core.quant_config.to_dict() | {name: getattr(core.core, name) for name in names}
    return fields | {"nonuniform": core.quant_config.core_has_level_tables}


def _quantizers(core: QuantizedCore) -> dict[str, GroupWiseQuantizer]:
    real, imag = core.G_quantizer.real, core.G_quantizer.imag
    return {"v_quantizer": core.v_quantizer, "G_quantizer.real": real, "G_quantizer.imag": imag}


def _expected(name: str, quantizer: GroupWiseQuantizer, entries: dict[str, Any]) -> _Expected:
    """The entries expected of a quantizer, with learned or stored scales as in `entries`."""
    groups = (quantizer.num_groups,)
    learned = f"{name}.log_scales" in entries
    expected: _Expected = {f"{name}.record": ((3,), torch.int64)}
    if learned and not quantizer.learnable:
        raise CheckpointError(
            f"the state dict holds trainable scales ({name}.log_scales), but this core is already "
            "converted; load it into a new core"
        )
    expected[f"{name}.log_scales" if learned else f"{name}.stored_scales"] = (
        groups,
        None if learned else SCALE_DTYPE,
    )
    zero_points = entries.get(f"{name}.zero_points")
    if zero_points is not None or quantizer.distinct_zero_points:
        earlier = isinstance(zero_points, Tensor) and zero_points.shape == groups
        count = groups if earlier else (quantizer.distinct_zero_points,)
        expected[f"{name}.zero_points"] = (count, torch.int8)
    if quantizer.table is not None:
        steps = quantizer.table.segments
        if learned:
            expected[f"{name}.table.first_level"] = ((), None)
            expected[f"{name}.table.log_steps"] = ((steps,), None)
        else:
            expected[f"{name}.table.stored_levels"] = ((1 + steps,), SCALE_DTYPE)
    return expected


def _check_entry(name: str, entry: Any, shape: tuple[int, ...], dtype: torch.dtype | None) -> None:
    fits = isinstance(entry, Tensor) and entry.shape == shape
    if fits and (entry.dtype == dtype if dtype else entry.is_floating_point()):
        return
    raise CheckpointError(
        f"{name} in the state dict is {_described(entry)}, not {dtype or 'floating point'} of "
        f"shape {shape}; it is damaged or belongs to another core"
    )


def _check_scales(name: str, scales: Tensor) -> None:
    if not bool((scales.isfinite() & (scales > 0)).all()):
        raise CheckpointError(
            f"{name} in the state dict of a calibrated core holds {scales.min().item()} to "
            f"{scales.max().item()}, but scales must be finite and positive; the file is damaged"
        )


def _every_zero_point(name: str, stored: Tensor | None, quantizer: GroupWiseQuantizer) -> Tensor:
    """Zero points for every group, from those in a state dict."""
    if stored is None:
        return torch.zeros_like(quantizer.zero_points)
    if quantizer.symmetric and bool(stored.any()):
        raise CheckpointError(
            f"{name} in the state dict must be 0, since the quantizer is symmetric; it is damaged"
        )
    return stored.expand(quantizer.num_groups).clone()


def _described(entry: Any) -> str:
    if isinstance(entry, Tensor):
        return f"{entry.dtype} of shape {tuple(entry.shape)}"
    return type(entry).__name__
