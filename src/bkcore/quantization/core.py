"""The Birman-Schwinger core with quantized potentials and features."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bkcore.core.arguments import require_device, require_real_float
from bkcore.core.enclosures import diagonal_enclosure
from bkcore.core.module import BirmanSchwingerCore
from bkcore.core.resolvent import resolvent_diagonal
from bkcore.errors import CheckpointError, InputError, ShapeError
from bkcore.kernels import sweep_rounded
from bkcore.quantization import core_state
from bkcore.quantization.complex_quantizer import ComplexQuantizer
from bkcore.quantization.config import QuantizationConfig
from bkcore.quantization.lifecycle import QuantizationLifecycle, QuantizationState
from bkcore.quantization.metrics import error_metrics
from bkcore.quantization.observers import require_usable
from bkcore.quantization.quantizers import GroupWiseQuantizer
from bkcore.quantization.transaction import all_or_nothing

_HISTORY = 1000


class QuantizedBirmanSchwingerCore(QuantizationLifecycle):
    """A `BirmanSchwingerCore` whose potentials and features are rounded to INT8 or INT4 codes.

    Build it and calibrate it on typical potentials. Then call `apply_ptq()` (PTQ modes), or call
    `enable_qat()`, train, and call `convert()` (QAT modes). Until then its forward pass is float,
    and the diagnostics say so. The core has no weights. QAT therefore trains the step sizes, the
    levels, which need not be evenly spaced (`bkcore.quantization.levels`), and any model that
    produces the potentials.

    Args:
        n_seq: sequence length N; fixed, because scales belong to (groups of) positions.
        config: a `QuantizationConfig`, or a mode as a string.
        epsilon, energy, hopping, onsite, causal: as in `BirmanSchwingerCore`.

    Raises:
        InputError, DTypeError: as in `BirmanSchwingerCore`, or if config is not valid.

    Attributes:
        core: the float core.
        v_quantizer: quantizer of the potentials (`GroupWiseQuantizer`).
        G_quantizer: quantizer of the resolvent diagonal (`ComplexQuantizer`).
    """

    _recalibrates_when_quantized = True  # quantization changed no weights, since it has none
    quant_config: QuantizationConfig

    def __init__(
        self,
        n_seq: int,
        config: QuantizationConfig | str = "ptq_int8",
        epsilon: float = 1.0,
        *,
        energy: float = 0.0,
        hopping: float = 1.0,
        onsite: float = -2.0,
        causal: bool = False,
    ) -> None:
        super().__init__()
        config = QuantizationConfig(config) if isinstance(config, str) else config
        if not isinstance(config, QuantizationConfig):
            raise InputError(
                f"config must be a QuantizationConfig or a mode, not {type(config).__name__}"
            )
        self._quant_config = config
        options: dict[str, Any] = {"energy": energy, "hopping": hopping, "onsite": onsite}
        self.core = BirmanSchwingerCore(n_seq, epsilon, causal=causal, **options)
        group_size = config.core_group_size(n_seq)
        self.v_quantizer = GroupWiseQuantizer(
            n_seq,
            group_size,
            config.bits,
            symmetric=config.symmetric if config.symmetric is not None else group_size == 1,
            learnable=config.is_qat,
            observer=config.observer,
            percentile=config.percentile,
            nonuniform=config.core_has_level_tables,
        )
        self.G_quantizer = ComplexQuantizer(
            n_seq,
            bits=config.bits,
            group_size=group_size,
            symmetric=config.symmetric,
            learnable=config.is_qat,
            observer=config.observer,
            percentile=config.percentile,
            nonuniform=config.core_has_level_tables,
            # All values lie in one disc with Im G >= 0, so one zero point suits all groups.
            shared_zero_point=config.bits == 4,
        )
        self._history: deque[dict[str, float]] = deque(maxlen=_HISTORY)
        self.register_state_dict_post_hook(core_state.reduce_zero_points)
        self.register_load_state_dict_pre_hook(core_state.check)

    @property
    def n_seq(self) -> int:
        """Sequence length N."""
        return self.core.n_seq

    def forward(
        self, v: Tensor, return_diagnostics: bool = False
    ) -> Tensor | tuple[Tensor, dict[str, Any]]:
        """Features [Re G, Im G] of potentials v.

        Args:
            v: real potentials (B, N), or (..., N).
            return_diagnostics: also return what ran, the quantization errors and a certified
                bound on them (keys as in `error_bound`). This costs several float64 sweeps. The
                errors are recorded for `get_quantization_statistics`.

        Returns:
            Real features (..., N, 2), or (features, diagnostics).

        Raises:
            ShapeError: if v does not end in N.
            DTypeError: if v is not real floating.
            CalibrationError: while calibrating, if v is not finite.
        """
        self._check(v)
        if self._state is QuantizationState.CALIBRATING:
            features = self._observe(v)
        elif self._quantizes:
            features = self._quantized_features(v)
        else:
            features = self.core(v)
        if not return_diagnostics:
            return features
        return features, self._diagnose(v, features)

    @torch.no_grad()
    def error_bound(self, v: Tensor, features: Tensor) -> dict[str, Any]:
        """The error of features from `forward(v)`, and a bound that provably covers it.

        The error of a site is `|features - G(v)|`, with G computed from the potentials as given.
        The bound is that of `diagonal_enclosure` for the decoded potentials, plus the error of the
        output codes and of float32, which is known exactly: at most half a step in Re and in Im, or
        the overshoot where codes clip. Clipped potentials are perturbations like any other.

        Args:
            v: potentials (..., N).
            features: what `forward` returned for them, (..., N, 2).

        Returns:
            `G_error`, measured in float64, and `G_error_bound`, both float64 (..., N);
            `clipped_inputs`, how many potentials were outside the range of the codes; and
            `clipped_outputs`, the same for outputs, with Re and Im counted separately.

        Raises:
            ShapeError: if `features` does not belong to potentials of this shape.
            DTypeError: if `features` is not a real floating-point tensor.
        """
        self._check(v)
        require_real_float("features", features)
        require_device("features", features, v)
        if features.shape != (*v.shape, 2):
            raise ShapeError(
                f"features must be {(*v.shape, 2)} for potentials of shape {tuple(v.shape)}, not "
                f"{tuple(features.shape)}; pass what forward returned for these potentials"
            )
        core = self.core
        z = complex(core.energy, core.epsilon)
        chain: dict[str, Any] = {"hopping": core.hopping, "onsite": core.onsite}
        chain["causal"] = core.causal
        used = self.v_quantizer.fake_quantize(v) if self._quantizes else v
        enclosure = diagonal_enclosure(v, used, z, **chain)
        result = torch.complex(*features.double().unbind(-1))
        clipped = {"clipped_inputs": 0, "clipped_outputs": 0}
        if self._quantizes:
            clipped["clipped_inputs"] = int(self.v_quantizer.clips(v).sum())
            real, imag = core(used).unbind(-1)
            outputs = (
                self.G_quantizer.real.clips(real).sum() + self.G_quantizer.imag.clips(imag).sum()
            )
            clipped["clipped_outputs"] = int(outputs)
        return {
            "G_error": (result - resolvent_diagonal(v.double(), z, **chain)).abs(),
            "G_error_bound": enclosure.bound(result),
            **clipped,
        }

    def estimate_model_size(self) -> dict[str, Any]:
        """Bytes of one sequence: its N potentials, 2 N features and the quantization parameters.

        The parameters are the scales, zero points and level tables in the state dict. The
        configuration and the calibration record, which it also holds, are not counted.

        Returns:
            `fp32_bytes`; `quantized_bytes`, the size once quantized, whatever the state now;
            `current_bytes`, the size now; `compression_ratio`, the first over the second; `bits`;
            and `parts`, the quantized bytes of `potentials`, `features` and `parameters`.
        """
        code_bytes = (self.n_seq * self.quant_config.bits + 7) // 8
        parts = {
            "potentials": code_bytes,
            "features": 2 * code_bytes,
            "parameters": self.v_quantizer.storage_bytes + self.G_quantizer.storage_bytes,
        }
        fp32_bytes = 3 * self.n_seq * 4
        quantized_bytes = sum(parts.values())
        is_quantized = self._state is QuantizationState.QUANTIZED
        return {
            "fp32_bytes": fp32_bytes,
            "quantized_bytes": quantized_bytes,
            "current_bytes": quantized_bytes if is_quantized else fp32_bytes,
            "compression_ratio": fp32_bytes / quantized_bytes,
            "bits": self.quant_config.bits,
            "parts": parts,
        }

    def get_quantization_statistics(self) -> dict[str, Any]:
        """Mode, bits, `calibrated`, and the errors of forward passes with diagnostics.

        `error_history` lists the mean absolute errors `v_mae`, `G_real_mae`, `G_imag_mae` of the
        last 1,000 quantized forward passes with `return_diagnostics=True`. `avg_v_mae`,
        `avg_G_real_mae` and `avg_G_imag_mae` are their averages, or 0.0 if there are none yet.
        """
        history = list(self._history)
        averages = {
            f"avg_{key}": sum(entry[key] for entry in history) / max(len(history), 1)
            for key in ("v_mae", "G_real_mae", "G_imag_mae")
        }
        return {
            "mode": self.quant_config.mode,
            "bits": self.quant_config.bits,
            "calibrated": self.calibrated,
            "error_history": history,
            **averages,
        }

    def get_extra_state(self) -> Tensor:
        """Lifecycle state, configuration and core as JSON bytes (uint8), for the state dict."""
        return core_state.encode(self)

    def set_extra_state(self, state: Tensor) -> None:
        """Restore the lifecycle state from a state dict.

        Raises:
            CheckpointError: if the state dict is of another core or configuration.
        """
        self._state = core_state.decode(self, state)

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """As in PyTorch; a refused state dict changes nothing.

        Raises:
            CheckpointError: if it is of another core or configuration, or an entry is missing,
                unknown, or of another shape or dtype. This also holds inside the state dict of a
                larger model, and with `strict=False`, which only allows all entries to be missing.
        """
        if not isinstance(state_dict, Mapping):
            raise CheckpointError(f"state_dict must be a mapping, not {type(state_dict).__name__}")
        if strict and not state_dict:
            raise CheckpointError("state_dict is empty; pass what core.state_dict() returned")
        return super().load_state_dict(state_dict, strict, assign)

    @property
    def _quantizes(self) -> bool:
        return self._state in (QuantizationState.TRAINING, QuantizationState.QUANTIZED)

    def _check(self, v: Tensor) -> None:
        self.core.check(v)
        device = self.v_quantizer.zero_points.device
        if v.device != device:
            raise InputError(f"v is on {v.device} but the core is on {device}; move one of them")

    def _quantized_features(self, v: Tensor) -> Tensor:
        if v.dtype == torch.float32 and not torch.is_grad_enabled():
            return self._rounded_features(v)
        features = self.core(self.v_quantizer.fake_quantize(v))
        real = self.G_quantizer.real.fake_quantize(features[..., 0])
        imag = self.G_quantizer.imag.fake_quantize(features[..., 1])
        return torch.stack((real, imag), dim=-1)

    def _rounded_features(self, v: Tensor) -> Tensor:
        """Like `_quantized_features`, bit for bit, in one pass over memory."""
        real, imag = self.G_quantizer.real, self.G_quantizer.imag
        quantizers = (self.v_quantizer, real, imag)
        for quantizer in quantizers:
            quantizer.require_scales()
        core = self.core
        lanes = v.numel() // core.n_seq
        chains = v.reshape(1, lanes, core.n_seq).transpose(1, 2)
        parts = sweep_rounded(
            chains,
            v.new_full((lanes,), core.energy - core.onsite),
            v.new_full((1, lanes), core.epsilon),
            v.new_full((1, lanes), core.hopping),
            torch.stack([quantizer.scales for quantizer in quantizers]),
            torch.stack([quantizer.zero_points for quantizer in quantizers]).float(),
            self.v_quantizer.group_size,
            self.v_quantizer.bits,
            not core.causal,
            levels=self._levels(),
        )
        return parts.permute(0, 3, 1, 2).reshape(*v.shape, 2)

    def _levels(self) -> Tensor | None:
        tables = [q.table for q in (self.v_quantizer, self.G_quantizer.real, self.G_quantizer.imag)]
        values = [table.values for table in tables if table is not None]
        return torch.stack(values) if values else None

    def _observe(self, v: Tensor) -> Tensor:
        require_usable(v)
        features = self.core(v)
        # To first order dG_ii = -G_ij^2 dv_j, and sum_i |G_ij|^2 = Im G_jj / eta (Ward). So this is
        # the cost of an error of v_j over all features, relative to its largest possible value.
        weight = None if self.core.causal else features[..., 1] * self.core.epsilon
        with all_or_nothing(self):
            self.v_quantizer.observe(v, weight)
            self.G_quantizer.real.observe(features[..., 0])
            self.G_quantizer.imag.observe(features[..., 1])
        return features

    def _diagnose(self, v: Tensor, features: Tensor) -> dict[str, Any]:
        with torch.no_grad():
            quantizes = self._quantizes
            exact = self.core(v) if quantizes else features
            used = self.v_quantizer.fake_quantize(v) if quantizes else v
            errors = {
                "v": error_metrics(v, used),
                "G_real": error_metrics(exact[..., 0], features[..., 0]),
                "G_imag": error_metrics(exact[..., 1], features[..., 1]),
            }
        if quantizes:
            self._history.append({f"{name}_mae": e["mae"] for name, e in errors.items()})
        return {
            "quantization_mode": self.quant_config.mode,
            "bits": self.quant_config.bits,
            "group_size": self.quant_config.group_size,
            "state": self._state.value,
            "executed": f"int{self.quant_config.bits}" if quantizes else "float",
            "calibrated": self.calibrated,
            "qat_enabled": self._state is QuantizationState.TRAINING,
            **{f"{name}_quantization_error": e for name, e in errors.items()},
            **self.error_bound(v, features),
        }

    def _on_start_calibration(self) -> None:
        if self.quant_config.is_qat:  # a converted core may train again
            self.v_quantizer.thaw()
            self.G_quantizer.thaw()
        self.v_quantizer.start_calibration()
        self.G_quantizer.start_calibration()

    def _on_end_calibration(self) -> None:
        self.v_quantizer.end_calibration()
        self.G_quantizer.end_calibration()

    def _on_enable_qat(self) -> None:
        """The fake quantizers are already in place."""

    def _on_quantize(self) -> None:
        self.v_quantizer.freeze()
        self.G_quantizer.freeze()


def create_quantized_birman_schwinger(
    n_seq: int, mode: str = "ptq_int8", epsilon: float = 1.0, group_size: int = 128
) -> QuantizedBirmanSchwingerCore:
    """Build a `QuantizedBirmanSchwingerCore` for sequences of `n_seq` potentials at z = i epsilon.

    Args:
        n_seq: sequence length, at least 1.
        mode: "ptq_int8", "qat_int8", "ptq_int4", "qat_int4" or "mixed_precision".
        epsilon: imaginary part of z, positive.
        group_size: positions that share a scale; 1 means one scale per position.

    Raises:
        InputError: for an unknown mode or a value out of range.
    """
    return QuantizedBirmanSchwingerCore(n_seq, QuantizationConfig(mode, group_size), epsilon)
