"""The quantizers of what enters the core of a mixer and of what leaves it."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor, nn

from bkcore.quantization.complex_quantizer import ComplexQuantizer
from bkcore.quantization.config import QuantizationConfig
from bkcore.quantization.quantizers import GroupWiseQuantizer

Phase = Literal["idle", "observe", "quantize"]


class CoreQuantizers(nn.Module):
    """Quantizers of the inputs and outputs of resolvent attention; none has scales per position.

    Gates and barriers have one scale per head. Queries, keys, values and the attention's output
    have one per channel. `phase` says what a call does: nothing, observe, or fake-quantize.
    """

    def __init__(
        self, heads: int, keys: int, width: int, config: QuantizationConfig, *, learnable: bool
    ) -> None:
        super().__init__()
        self.phase: Phase = "idle"
        common: dict[str, Any] = {"bits": config.bits, "learnable": learnable, "norm": 2}
        common |= {"observer": config.observer, "percentile": config.percentile}
        common |= {"nonuniform": config.has_level_tables}

        def real(channels: int, symmetric: bool) -> GroupWiseQuantizer:
            size = 1 if config.per_channel else channels
            return GroupWiseQuantizer(channels, size, symmetric=symmetric, **common)

        # SiLU never goes below -0.28, so symmetric codes would waste half their range.
        skewed = config.symmetric is True
        self.gate = real(heads, skewed)
        self.barrier = real(heads, skewed)
        self.query = real(keys, skewed)
        self.key = real(keys, skewed)
        self.value = real(width, skewed)
        # Unlike Im g, both parts of the output take either sign.
        self.found = ComplexQuantizer(
            width, config.per_channel, symmetric=config.symmetric is not False, **common
        )

        inputs = (self.gate, self.barrier, self.query, self.key, self.value)
        self._parts = (*inputs, self.found.real, self.found.imag)

    def parts(self) -> tuple[GroupWiseQuantizer, ...]:
        """The seven real quantizers, inputs first."""
        return self._parts

    @property
    def rounds_only(self) -> bool:
        """Whether a call only rounds to stored codes, with nothing to observe or learn."""
        return self.phase == "quantize" and not self._parts[0].learnable

    def apply_to(self, quantizer: GroupWiseQuantizer, x: Tensor) -> Tensor:
        """Pass x (..., channels) through one quantizer as the phase asks."""
        if self.phase == "observe":
            quantizer.observe(x)
        return quantizer.fake_quantize(x) if self.phase == "quantize" else x
