"""The steps of quantization as an explicit state, shared by the core and the language model.

    float -> calibrating -> calibrated -> quantized                (post-training, PTQ)
                                       -> training -> quantized    (quantization-aware, QAT)

A step out of order raises `LifecycleError`, which names the missing step; nothing is silently
repaired or skipped. A step that fails with any exception leaves the model exactly as it was, ready
for another try.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum

from torch import nn

from bkcore.errors import LifecycleError
from bkcore.quantization.config import QuantizationConfig
from bkcore.quantization.transaction import all_or_nothing


class QuantizationState(str, Enum):
    """The stage of a model between float and quantized."""

    FLOAT = "float"
    CALIBRATING = "calibrating"
    CALIBRATED = "calibrated"
    TRAINING = "training"
    QUANTIZED = "quantized"

    @property
    def has_scales(self) -> bool:
        """True once calibration has ended."""
        return self not in (QuantizationState.FLOAT, QuantizationState.CALIBRATING)


_NEXT_STEP = {
    QuantizationState.FLOAT: "start_calibration()",
    QuantizationState.CALIBRATING: "end_calibration()",
    QuantizationState.CALIBRATED: "apply_ptq() in a PTQ mode, enable_qat() in a QAT mode",
    QuantizationState.TRAINING: "convert()",
    QuantizationState.QUANTIZED: "none; to quantize again, start from the float model",
}


class QuantizationLifecycle(nn.Module):
    """A module with the public quantization steps.

    A subclass does the work in the `_on_...` methods. They may fail at any point, because each runs
    inside `all_or_nothing`.
    """

    _state: QuantizationState = QuantizationState.FLOAT
    _quant_config: QuantizationConfig | None = None
    _recalibrates_when_quantized = False

    @property
    def quantization_state(self) -> QuantizationState:
        """The current state."""
        return self._state

    @property
    def quant_config(self) -> QuantizationConfig | None:
        """The configuration, or None for a model that was built without quantization."""
        return self._quant_config

    @property
    def calibrated(self) -> bool:
        """True once calibration has ended."""
        return self._state.has_scales

    def start_calibration(self) -> None:
        """Start observing ranges; forward passes stay float. A calibrated model starts over."""
        self._require_config("start_calibration")
        allowed = {QuantizationState.FLOAT, QuantizationState.CALIBRATED}
        if self._recalibrates_when_quantized:
            allowed.add(QuantizationState.QUANTIZED)
        self._require("start_calibration", allowed)
        with self._step_to(QuantizationState.CALIBRATING):
            self._on_start_calibration()

    def end_calibration(self) -> None:
        """Turn the observations into scales and zero points.

        Raises:
            CalibrationError: if no data was seen; the model stays in calibration.
        """
        self._require("end_calibration", {QuantizationState.CALIBRATING})
        with self._step_to(QuantizationState.CALIBRATED):
            self._on_end_calibration()

    def apply_ptq(self) -> None:
        """Quantize a calibrated model of a PTQ mode; does nothing if already done."""
        config = self._require_config("apply_ptq")
        if config.is_qat:
            raise LifecycleError(
                f"apply_ptq() is not a step of mode {config.mode!r}; call enable_qat(), train, "
                "then convert(); or build the model with a 'ptq_...' mode"
            )
        if self._state is QuantizationState.QUANTIZED:
            return
        self._require("apply_ptq", {QuantizationState.CALIBRATED})
        with self._step_to(QuantizationState.QUANTIZED):
            self._on_quantize()

    def enable_qat(self) -> None:
        """Start fake quantization of a calibrated model in a QAT mode; nothing if already done."""
        config = self._require_config("enable_qat")
        if not config.is_qat:
            raise LifecycleError(
                f"enable_qat() is not a step of mode {config.mode!r}; call apply_ptq(), or build "
                "the model with a 'qat_...' mode"
            )
        if self._state is QuantizationState.TRAINING:
            return
        self._require("enable_qat", {QuantizationState.CALIBRATED})
        with self._step_to(QuantizationState.TRAINING):
            self._on_enable_qat()

    def convert(self) -> None:
        """End quantization-aware training: freeze scales and weights into codes, bit for bit."""
        config = self._require_config("convert")
        if not config.is_qat:
            raise LifecycleError(
                f"convert() is not a step of mode {config.mode!r}; call apply_ptq(), or build the "
                "model with a 'qat_...' mode"
            )
        self._require("convert", {QuantizationState.TRAINING})
        with self._step_to(QuantizationState.QUANTIZED):
            self._on_quantize()

    def _require_config(self, step: str) -> QuantizationConfig:
        if self._quant_config is None:
            raise LifecycleError(
                f"{step}() needs a quantization mode, but this model has none; choose one with "
                'configure_quantization("ptq_int8")'
            )
        return self._quant_config

    def _require(self, step: str, allowed: set[QuantizationState]) -> None:
        if self._state in allowed:
            return
        needed = " or ".join(sorted(state.value for state in allowed))
        raise LifecycleError(
            f"{step}() needs a model that is {needed}, but this one is {self._state.value}; "
            f"the next step from here is {_NEXT_STEP[self._state]}"
        )

    @contextmanager
    def _step_to(self, state: QuantizationState) -> Iterator[None]:
        """Enter the state if the block succeeds; undo the block if anything raises."""
        with all_or_nothing(self):
            yield
            self._set_state(state)

    def _set_state(self, state: QuantizationState) -> None:
        self._state = state

    def _on_start_calibration(self) -> None:
        raise NotImplementedError

    def _on_end_calibration(self) -> None:
        raise NotImplementedError

    def _on_enable_qat(self) -> None:
        raise NotImplementedError

    def _on_quantize(self) -> None:
        raise NotImplementedError
