"""The quantization of a language model, step by step: what each step does to its layers."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from bkcore.errors import CheckpointError, InputError, LifecycleError
from bkcore.model import conversion, inputs, receipt
from bkcore.model.certificate import certify
from bkcore.model.config import ResNetBKConfig, form_of
from bkcore.model.moe import uncounted
from bkcore.model.state import StreamState
from bkcore.model.structure import check_structure
from bkcore.quantization.config import QuantizationConfig
from bkcore.quantization.lifecycle import QuantizationLifecycle, QuantizationState
from bkcore.quantization.transaction import all_or_nothing

_SAMPLE = 128
"""How many tokens of the calibration data the receipt certifies the cores on."""

_REPLACING = {"start_calibration", "apply_ptq", "enable_qat", "convert"}
"""Steps that replace layers, and the first step towards them, so that a refusal comes early."""

_QUANTIZED_TENSORS = {"packed", "stored_scales", "log_scales", "zero_points", "second"}
"""Names of the tensors that a float model does not have."""


class QuantizableModel(QuantizationLifecycle, PreTrainedModel):
    """A language model's lifecycle from float to quantized. `ResNetBKForCausalLM` is the model.

    A subclass adds the model by defining `_hidden` and `_as_built`.

    Attributes:
        receipt: what quantization did to every tensor, see `bkcore.model.receipt.of_quantized`.
            None before calibration; only its `calibration` part until the model is quantized.
    """

    config_class = ResNetBKConfig
    config: ResNetBKConfig

    def __init__(self, config: ResNetBKConfig) -> None:
        super().__init__(config)
        self.receipt: receipt.Receipt | None = None
        self._certified_ids: Tensor | None = None  # some of the calibration data

    def _hidden(
        self, input_ids: Tensor, real: Tensor | None = None, state: StreamState | None = None
    ) -> tuple[Tensor, Tensor, StreamState | None]:
        """Run the layers on ids (B, N); bool (B, N) is False at padding."""
        raise NotImplementedError

    def _as_built(self, config: ResNetBKConfig) -> nn.Module:
        """A configuration's model on the meta device, without what a subclass adds."""
        raise NotImplementedError

    def configure_quantization(self, config: QuantizationConfig | str) -> None:
        """Choose how a float model will be quantized.

        Raises:
            InputError: for an unknown mode.
            LifecycleError: if the model is no longer in the float state, or its mixer cannot be
                quantized.
        """
        self._require("configure_quantization", {QuantizationState.FLOAT})
        if not self.config.mixer_traits.quantizes:
            raise LifecycleError(
                f'a model with mixer="{self.config.mixer}" is for comparison only and cannot be '
                'quantized; build one with mixer="resolvent"'
            )
        config = QuantizationConfig(config) if isinstance(config, str) else config
        conversion.check_tensor_bits(self, config)
        with self._whole_or_not():
            self._quant_config = config
            self._set_state(QuantizationState.FLOAT)

    def assign_bits(self, tensor_bits: dict[str, int]) -> None:
        """Choose the bits of individual weights, before or after calibration.

        Args:
            tensor_bits: as in `QuantizationConfig`; replaces the earlier choice.

        Raises:
            InputError: for an unknown name, or bits that a weight cannot have.
            CalibrationError: after calibration, for INT4 weights that were not calibrated for it.
            LifecycleError: if the weights are quantized already, or the model has no mode.
        """
        config = self._require_config("assign_bits")
        self._require("assign_bits", {QuantizationState.FLOAT, QuantizationState.CALIBRATED})
        config = replace(config, tensor_bits=dict(tensor_bits))
        conversion.check_tensor_bits(self, config)
        with self._whole_or_not():
            if self._state is QuantizationState.CALIBRATED:
                conversion.keep_moments(self, config)
            self._quant_config = config
            self._set_state(self._state)

    def calibrate_quantization(self, batches: Iterable[Tensor | Mapping[str, Any]]) -> None:
        """Calibrate on token ids, then quantize (PTQ modes) or prepare to train (QAT modes).

        If anything is raised, the model is left as it was.

        Args:
            batches: token ids (B, N), or mappings with `input_ids` and, if there is padding,
                `attention_mask`, both as in `forward`, such as a tokenizer returns with
                return_tensors="pt". Padding is not observed; other entries are ignored.

        Raises:
            LifecycleError: without a quantization mode, past the calibrated state, or if something
                was put between the model and its layers, see `bkcore.model.structure`.
            CalibrationError: if there is no batch, or an activation or a weight is not finite.
            InputError: if a batch is something else, or as in `forward`.
        """
        config = self._require_config("calibrate_quantization")
        if isinstance(batches, Tensor | Mapping) or not isinstance(batches, Iterable):
            raise InputError(
                "calibrate_quantization takes an iterable of batches, not a "
                f"{type(batches).__name__}; for one batch of token ids give [ids]"
            )
        was_training = self.training
        with self._whole_or_not():
            self.start_calibration()
            self.eval()
            self._observe(batches)
            self.end_calibration()
            self.train(was_training)
            if config.is_qat:
                self.enable_qat()
            else:
                self.apply_ptq()

    @torch.no_grad()
    def _observe(self, batches: Iterable[Tensor | Mapping[str, Any]]) -> None:
        for batch in batches:
            ids, real = inputs.calibration_batch(batch)
            self._hidden(ids, real)
            first = ids[0] if real is None else ids[0, real[0]]
            self._certified_ids = first[None, :_SAMPLE].clone()

    def estimate_model_size(self) -> dict[str, Any]:
        """Bytes of the parameters and buffers.

        Returns:
            `fp32_bytes`; `quantized_bytes`, the size once quantized, whatever the state now;
            `current_bytes`, the size now; `compression_ratio`, the first over the second; and
            `bits` of the core.

        Raises:
            LifecycleError: without a quantization mode.
        """
        config = self._require_config("estimate_model_size")
        plain = copy.deepcopy(self.config)
        plain.quantization = None
        model = self._as_built(plain)
        own_bytes = sum(  # what a subclass adds, which is never quantized
            tensor.numel() * tensor.element_size()
            for name, tensor in [*self.named_parameters(), *self.named_buffers()]
            if not hasattr(model, name.partition(".")[0])
        )
        fp32_bytes = conversion.storage_bytes(model) + own_bytes
        conversion.attach_core_quantizers(model, config, learnable=False)
        conversion.make_empty(model, config, trainable=False)
        quantized_bytes = conversion.storage_bytes(model) + own_bytes
        return {
            "fp32_bytes": fp32_bytes,
            "quantized_bytes": quantized_bytes,
            "current_bytes": conversion.storage_bytes(self),
            "compression_ratio": fp32_bytes / quantized_bytes,
            "bits": config.bits,
        }

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """As in PyTorch, for a model of the same quantization state.

        Raises:
            CheckpointError: if the state dict is of another state, whose tensors differ.
        """
        if _quantized_keys(state_dict) != _quantized_keys(self.state_dict()):
            raise CheckpointError(
                "the state dict is from a model in another quantization state; this model's is "
                f"{self._state.value}; save_pretrained() and from_pretrained() keep the state"
            )
        return super().load_state_dict(state_dict, *args, **kwargs)

    def _take_form(self, fields: dict[str, Any]) -> None:
        """Give a freshly built float model the modules of the state that `fields` names."""
        config, state = form_of(fields)
        self._quant_config = config
        conversion.check_tensor_bits(self, config)
        if state is not QuantizationState.FLOAT:
            learnable = config.is_qat and state is not QuantizationState.QUANTIZED
            conversion.attach_core_quantizers(self, config, learnable=learnable)
        if state is QuantizationState.CALIBRATED:
            conversion.attach_moments(self, config)
        if state in (QuantizationState.TRAINING, QuantizationState.QUANTIZED):
            conversion.make_empty(self, config, trainable=state is QuantizationState.TRAINING)
            conversion.set_phase(self, "quantize")
        self._set_state(state)

    def _check_trainable(self) -> None:
        if self._state is QuantizationState.QUANTIZED and torch.is_grad_enabled():
            raise LifecycleError(
                "the model is quantized, and its weights are codes, which cannot be trained; train "
                "the float model, or use a QAT mode and train before convert()"
            )

    def _require(self, step: str, allowed: set[QuantizationState]) -> None:
        super()._require(step, allowed)
        if step in _REPLACING:
            check_structure(self, self._as_built(copy.deepcopy(self.config)), step)

    @contextmanager
    def _whole_or_not(self) -> Iterator[None]:
        """Restore the model and its configuration if the block raises."""
        before = self.config.quantization
        try:
            with all_or_nothing(self):
                yield
        except BaseException:
            self.config.quantization = before
            raise

    def _set_state(self, state: QuantizationState) -> None:
        super()._set_state(state)
        assert self._quant_config is not None
        self.config.quantization = {**self._quant_config.to_dict(), "state": state.value}

    def _on_start_calibration(self) -> None:
        config = self._require_config("start_calibration")
        conversion.attach_core_quantizers(self, config, learnable=config.is_qat)
        for layer, moments in conversion.attach_moments(self, config):
            moments.watch(layer)
        conversion.set_phase(self, "observe")
        receipt.start_counting(self)
        self._certified_ids = None

    def _on_end_calibration(self) -> None:
        for quantizers in conversion.core_quantizers(self):
            for quantizer in quantizers.parts():
                quantizer.end_calibration()
        for moments in conversion.input_moments(self):
            moments.unwatch()
            moments.merge_processes()
        conversion.set_phase(self, "idle")
        self.receipt = receipt.of_calibration(self)

    def _on_enable_qat(self) -> None:
        conversion.make_trainable(self, self._require_config("enable_qat"))
        conversion.set_phase(self, "quantize")

    def _on_quantize(self) -> None:
        config = self._require_config("apply_ptq")
        before = receipt.float_weights(self)
        conversion.make_packed(self, config)
        for quantizers in conversion.core_quantizers(self):
            for quantizer in quantizers.parts():
                quantizer.freeze()
        conversion.set_phase(self, "quantize")
        self.receipt = receipt.of_quantized(self, config, before, self.receipt or {})
        if self._certified_ids is not None:
            was_training = self.training
            with uncounted(self.eval()):
                self.receipt |= receipt.of_cores(certify(self, self._certified_ids))
            self.train(was_training)


def _quantized_keys(state_dict: Mapping[str, Any]) -> set[str]:
    """The keys that a float model does not have: those of quantized tensors."""
    return {key for key in state_dict if key.rpartition(".")[2] in _QUANTIZED_TENSORS}
