"""What to quantize and how: an immutable, validated configuration."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from dataclasses import fields as dataclass_fields
from typing import Any, ClassVar, Literal

from bkcore.arguments import check_group_size, did_you_mean
from bkcore.errors import InputError
from bkcore.reading import shown

Part = Literal["core", "expert", "head"]
"""A part of the language model: the mixer around the core, the experts, the tied output head."""

OBSERVERS = ("minmax", "percentile", "mae", "mse", "auto")
WEIGHT_ROUNDINGS = ("gptq", "nearest")

MODES = ("ptq_int8", "qat_int8", "ptq_int4", "qat_int4", "mixed_precision")

CALIBRATION_TOKENS = 32_768
"""How many tokens commands calibrate on by default; a checkpoint keeps as many."""

QAT_LEARNING_RATE = 1e-4
"""The default peak learning rate of commands that train through codes (QAT)."""


@dataclass(frozen=True)
class QuantizationConfig:
    """Quantization mode and granularity.

    Attributes:
        mode: "ptq_int8", "qat_int8", "ptq_int4", "qat_int4" or "mixed_precision" (language model:
            INT4 experts, INT8 core, FP16 head; a standalone core is INT8 in that mode).
        group_size: channels that share a scale, at least 1; a size above the number of channels
            means all of them. In a standalone core, 1 means one scale per sequence position. In
            the language model it groups the inputs of INT4 weights; the core's activations there
            always have one scale per channel.
        per_channel: False uses one scale for the whole tensor instead.
        symmetric: True or False forces every quantizer of the core. None (default) chooses by the
            kind of tensor. Real parts are symmetric and imaginary parts asymmetric, because
            Im G >= 0. Potentials are asymmetric, because errors near a resonance cost more than
            errors on the other side; but if each position has its own scale they are symmetric, to
            save bytes. In the language model, the core's inputs are asymmetric, since they come
            from SiLU or a projection. Weights are always symmetric.
        observer: how the range of an activation is chosen from the calibration data: "minmax", the
            extremes; "percentile"; "mae" or "mse", the least mean absolute or squared error; or
            "auto", whichever of the four has the least error for each tensor. None (default)
            minimizes the error that counts: "mae" in a standalone core, "mse" in the language
            model.
        percentile: percent of the values that "percentile" keeps in range, in (0, 100].
        weight_rounding: how PTQ rounds INT4 weights. With "gptq" (default), later columns make up
            for the errors of earlier ones, using the second moments of the calibration
            activations; "nearest" rounds each weight separately. See `gptq`.
        tensor_bits: bits of individual weights of the language model by name, such as
            {"layers.0.experts.experts.3.up": 8}: 4, 8, or 16 for float16 (not in QAT). They
            override the mode, which applies to all other weights.
        min_size: weights of the language model with fewer numbers than this stay in float16 after
            PTQ, unless `tensor_bits` names them: for such small weights an integer product is
            slower than a float one, for one row and for many (`bkcore bench inference --only
            layers`). With 0 none stay. QAT has no float16 and quantizes them too.
        nonuniform: whether the levels of a core's codes may be unevenly spaced (`LevelTable`). True
            uses level tables in the QAT modes of a standalone core, which learn them, and at 4 bits
            in the language model, where QAT learns and PTQ fits them. False uses none, and saves 48
            bytes per table at 8 bits and 32 at 4. None (default) means True, except for "qat_int4"
            in a standalone core, where three tables would take more bytes than all scales.

    Raises:
        InputError: for an unknown mode, observer or rounding, a group size below 1, a percentile
            or min_size out of range, a flag that is not a bool, or bits that a weight cannot have.
    """

    mode: str = "ptq_int8"
    group_size: int = 128
    per_channel: bool = True
    symmetric: bool | None = None
    observer: str | None = None
    percentile: float = 99.9
    weight_rounding: str = "gptq"
    nonuniform: bool | None = None
    tensor_bits: dict[str, int] | None = field(default=None, hash=False)
    min_size: int = 2048

    PTQ_INT8: ClassVar[str] = "ptq_int8"
    QAT_INT8: ClassVar[str] = "qat_int8"
    PTQ_INT4: ClassVar[str] = "ptq_int4"
    QAT_INT4: ClassVar[str] = "qat_int4"
    MIXED_PRECISION: ClassVar[str] = "mixed_precision"

    def __post_init__(self) -> None:
        if not _is_one_of(self.mode, MODES):
            raise InputError(
                f"unknown quantization mode {shown(self.mode)}; choose one of {', '.join(MODES)}"
                f"{did_you_mean(self.mode, MODES)}"
            )
        check_group_size(self.group_size)
        if not isinstance(self.per_channel, bool):
            raise InputError(f"per_channel must be True or False, not {shown(self.per_channel)}")
        for name in ("symmetric", "nonuniform"):
            if not isinstance(getattr(self, name), bool | None):
                raise InputError(
                    f"{name} must be None, True or False, not {shown(getattr(self, name))}"
                )
        check_observer(self.observer, self.percentile)
        if not _is_one_of(self.weight_rounding, WEIGHT_ROUNDINGS):
            raise InputError(
                f"unknown weight_rounding {shown(self.weight_rounding)}; "
                f"choose one of {WEIGHT_ROUNDINGS}"
                f"{did_you_mean(self.weight_rounding, WEIGHT_ROUNDINGS)}"
            )
        if isinstance(self.min_size, bool) or not isinstance(self.min_size, int):
            raise InputError(f"min_size must be an integer, not {shown(self.min_size)}")
        if self.min_size < 0:
            raise InputError(f"min_size must be at least 0, not {shown(self.min_size)}")
        self._check_tensor_bits()

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> QuantizationConfig:
        """Build from the result of `to_dict`, even from a version without `min_size`.

        Raises:
            InputError: if `fields` is not a dictionary of these fields, or a value is not allowed.
        """
        known = {f.name for f in dataclass_fields(cls)}
        if not isinstance(fields, dict) or not fields.keys() <= known:
            unknown = sorted(fields.keys() - known, key=str) if isinstance(fields, dict) else fields
            raise InputError(
                f"fields must be a dictionary of {', '.join(sorted(known))}, not {shown(unknown)}"
                f"{did_you_mean(unknown, known)}"
            )
        return cls(**{"min_size": 0, **fields})

    @property
    def bits(self) -> int:
        """Bits of the core's codes: 4 or 8."""
        return 4 if self.mode.endswith("int4") else 8

    @property
    def qmin(self) -> int:
        """Smallest code of the core: -128 or -8."""
        return self._code_range[0]

    @property
    def qmax(self) -> int:
        """Largest code of the core: 127 or 7."""
        return self._code_range[1]

    @property
    def _code_range(self) -> tuple[int, int]:
        from bkcore.quantization.affine import code_range  # needs PyTorch, the options do not

        return code_range(self.bits)

    @property
    def is_qat(self) -> bool:
        """True for the modes that train with fake quantization."""
        return self.mode.startswith("qat")

    @property
    def has_level_tables(self) -> bool:
        """True if activations of the language model's cores have level tables. At 8 bits they have
        none, since uneven levels bring the model no noticeable gain."""
        return self.nonuniform is not False and self.bits == 4

    @property
    def core_has_level_tables(self) -> bool:
        """True if the codes of a standalone core have level tables."""
        wanted = self.bits == 8 if self.nonuniform is None else self.nonuniform
        return self.is_qat and wanted

    def weight_bits(self, part: Part, name: str | None = None, size: int | None = None) -> int:
        """Bits of the weights in a part of the language model: 4, 8 or 16 (float16).

        Args:
            part: where the weight is.
            name: the weight's name, for which `tensor_bits` may override the mode.
            size: how many numbers it has, to compare with `min_size`; None skips that.
        """
        if self.tensor_bits is not None and name in self.tensor_bits:
            return self.tensor_bits[name]
        if size is not None and size < self.min_size and not self.is_qat:
            return 16
        if self.mode == self.MIXED_PRECISION:
            return {"expert": 4, "core": 8, "head": 16}[part]
        return self.bits

    def compensates(self, part: Part, name: str | None = None, size: int | None = None) -> bool:
        """True if the weights of a part are INT4 codes that make up for each other's errors (GPTQ).

        Arguments as in `weight_bits`. The head is never rounded that way: its rows are also the
        embedding, and the best codes for one use are not the best for the other.
        """
        is_int4 = self.weight_bits(part, name, size) == 4 and part != "head"
        return is_int4 and not self.is_qat and self.weight_rounding == "gptq"

    def core_group_size(self, num_channels: int) -> int:
        """Channels per scale of a standalone core with this many positions."""
        return self.group_size if self.per_channel else num_channels

    def to_dict(self) -> dict[str, Any]:
        """The fields, ready for JSON; `tensor_bits` only if set."""
        fields = asdict(self)
        if self.tensor_bits is None:
            del fields["tensor_bits"]
        return fields

    def _check_tensor_bits(self) -> None:
        if self.tensor_bits is None:
            return
        if not isinstance(self.tensor_bits, dict):
            raise InputError(
                "tensor_bits must be a dictionary from names to bits, not "
                f"{shown(self.tensor_bits)}"
            )
        allowed = (4, 8) if self.is_qat else (4, 8, 16)
        for name, bits in self.tensor_bits.items():
            if not isinstance(name, str) or type(bits) is not int or bits not in allowed:
                raise InputError(
                    f"tensor_bits[{shown(name)}] is {shown(bits)}; "
                    f"mode {self.mode!r} takes {allowed}"
                )


def _is_one_of(value: object, choices: tuple[str, ...]) -> bool:
    return isinstance(value, str) and value in choices


def check_observer(observer: str | None, percentile: float) -> None:
    """Raise `InputError` unless these are valid choices of a range."""
    if observer is not None and not _is_one_of(observer, OBSERVERS):
        raise InputError(
            f"unknown observer {shown(observer)}; choose one of {OBSERVERS}, or None"
            f"{did_you_mean(observer, OBSERVERS)}"
        )
    if isinstance(percentile, bool) or not isinstance(percentile, int | float):
        raise InputError(f"percentile must be a number, not {shown(percentile)}")
    if not 0 < percentile <= 100:
        raise InputError(f"percentile must lie in (0, 100], not {shown(percentile)}")
