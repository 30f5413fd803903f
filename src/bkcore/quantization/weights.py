"""Weight matrices as codes: packed for inference, or float weights trained through the same codes.

Both kinds give codes and scales, so the same integer product serves both. A weight (O, K) has one
scale per row and group of columns; INT8 uses one group per row. A group size above K means K.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bkcore.errors import CalibrationError
from bkcore.kernels import round_weight
from bkcore.kernels.checks import check_bits, count_groups, fit_group_size
from bkcore.kernels.int4_levels import nearest_codes, saturates, to_codes, to_levels
from bkcore.quantization import affine
from bkcore.quantization.packing import pack_int4, unpack_int4
from bkcore.quantization.storage import StoredDtypes

LARGEST_CODE = 127
"""The level of a weight's largest code, at 8 bits and at 4."""

_FRACTIONS = 24


def _grouped(x: Tensor, group_size: int) -> Tensor:
    """Reshape (O, K) to (O, G, group_size), padding an incomplete last group with zeros."""
    group_size = fit_group_size(group_size, x.shape[1])
    padding = -x.shape[1] % group_size
    return nn.functional.pad(x, (0, padding)).unflatten(1, (-1, group_size))


def each_column(scales: Tensor, group_size: int, columns: int) -> Tensor:
    """Repeat the scales of groups, (..., G), to (..., columns)."""
    group_size = fit_group_size(group_size, columns)
    return scales.repeat_interleave(group_size, dim=-1)[..., :columns]


def search_weight_scales(
    weight: Tensor,
    bits: int,
    group_size: int,
    per_tensor: bool = False,
    importance: Tensor | None = None,
) -> Tensor:
    """Storable scales (O, G) that minimize the squared error of a weight (O, K).

    Args:
        weight: float (O, K), finite.
        bits: 4 or 8.
        group_size: columns that share a scale.
        per_tensor: choose one scale for the whole matrix; it is repeated to (O, G).
        importance: (K,), the weight of each column's squared error; None means 1 for all.

    Raises:
        CalibrationError: if the weight holds NaN or infinity.
    """
    if not bool(torch.isfinite(weight).all()):
        raise CalibrationError("a weight holds NaN or infinity and cannot be quantized")
    grouped = _grouped(weight.detach().float(), group_size)
    largest = grouped.abs().amax(-1)
    if per_tensor:
        largest = largest.amax().expand_as(largest)
    largest = torch.where(largest > 0, largest, torch.ones_like(largest))
    counts = 1.0 if importance is None else _grouped(importance[None], group_size)
    best_scale = affine.storable(largest / LARGEST_CODE)
    best_error = torch.full_like(largest, torch.inf)
    for fraction in torch.linspace(1.0, 0.5 if bits == 4 else 0.8, _FRACTIONS).tolist():
        scale = affine.storable(largest * (fraction / LARGEST_CODE))
        rounded = scale[..., None] * nearest_codes(grouped / scale[..., None], bits)
        error = ((rounded - grouped).square() * counts).sum(-1)
        if per_tensor:
            error = error.sum().expand_as(error)
        better = error < best_error
        best_scale = torch.where(better, scale, best_scale)
        best_error = torch.where(better, error, best_error)
    return best_scale


class PackedWeight(StoredDtypes):
    """A quantized weight (O, K): int8 codes, or two INT4 codes per byte, and bfloat16 scales.

    At 4 bits a code stands for one of sixteen int8 levels (`bkcore.kernels.int4_levels`). `codes`
    returns and `from_codes` takes these levels, so a weight is scale times code at 4 bits as at 8.

    Attributes:
        packed: int8 (O, K) at 8 bits, uint8 (O, ceil(K / 2)) at 4.
        stored_scales: bfloat16 (O, G).
        tokens_seen: calibration tokens whose second moments shaped the codes (see `gptq`); 0 if
            each weight was rounded separately. Not saved here: a model's receipt records it.
    """

    stored = ("stored_scales",)

    def __init__(self, shape: tuple[int, int], bits: int, group_size: int) -> None:
        super().__init__()
        check_bits(bits)
        rows, columns = shape
        self.shape, self.bits = shape, bits
        self.group_size = fit_group_size(group_size, columns)
        width, dtype = (columns, torch.int8) if bits == 8 else ((columns + 1) // 2, torch.uint8)
        groups = count_groups(columns, self.group_size)
        self.register_buffer("packed", torch.zeros(rows, width, dtype=dtype))
        self.register_buffer("stored_scales", torch.ones(rows, groups, dtype=affine.SCALE_DTYPE))
        self.tokens_seen = 0
        self.packed: Tensor
        self.stored_scales: Tensor

    @classmethod
    def from_codes(cls, codes: Tensor, scales: Tensor, bits: int, group_size: int) -> PackedWeight:
        """Store int8 codes (O, K) and float32 scales (O, G)."""
        weight = cls((codes.shape[0], codes.shape[1]), bits, group_size)
        weight.packed = codes if bits == 8 else pack_int4(to_codes(codes))
        weight.stored_scales = scales.to(affine.SCALE_DTYPE)
        return weight

    def codes(self) -> Tensor:
        """int8 codes (O, K)."""
        return self._unpacked(self.packed)

    def scales(self) -> Tensor:
        """float32 scales (O, G)."""
        return self.stored_scales.float()

    def rows(self, index: Tensor) -> Tensor:
        """float32 values of the rows at an integer index (...): (..., K)."""
        codes = self._unpacked(nn.functional.embedding(index, self.packed))
        scales = nn.functional.embedding(index, self.scales())
        return codes * each_column(scales, self.group_size, self.shape[1])

    def clipped(self, weight: Tensor) -> Tensor:
        """Which numbers of a float weight (O, K) lie outside the range of these codes; bool."""
        ratio = weight / each_column(self.scales(), self.group_size, self.shape[1])
        return saturates(ratio, self.bits)

    def _unpacked(self, packed: Tensor) -> Tensor:
        return packed if self.bits == 8 else to_levels(unpack_int4(packed, self.shape[1]))

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"{self.shape[0]}, {self.shape[1]}, bits={self.bits}, group_size={self.group_size}"


class TrainableWeight(nn.Module):
    """A float weight (O, K) that computes with its codes, with learned scales (O, G)."""

    def __init__(self, shape: tuple[int, int], bits: int, group_size: int) -> None:
        super().__init__()
        check_bits(bits)
        self.bits, self.group_size = bits, fit_group_size(group_size, shape[1])
        groups = count_groups(shape[1], self.group_size)
        self.weight = nn.Parameter(torch.zeros(shape))
        self.log_scales = nn.Parameter(torch.zeros(shape[0], groups))

    @classmethod
    def from_float(
        cls, weight: Tensor, scales: Tensor, bits: int, group_size: int
    ) -> TrainableWeight:
        """Start from a trained weight (O, K) and scales (O, G)."""
        trainable = cls((weight.shape[0], weight.shape[1]), bits, group_size)
        with torch.no_grad():
            trainable.weight.copy_(weight)
            trainable.log_scales.copy_(scales.log())
        return trainable

    @property
    def shape(self) -> torch.Size:
        """(O, K)."""
        return self.weight.shape

    def scales(self) -> Tensor:
        """float32 scales (O, G) in use, storable and differentiable."""
        return affine.scale_from_log(self.log_scales)

    def codes_and_values(self) -> tuple[Tensor, Tensor]:
        """int8 codes (O, K), and the float32 values they stand for, differentiable."""
        return round_weight(self.weight.float(), self.scales(), self.group_size, self.bits)

    def rows(self, index: Tensor) -> Tensor:
        """float32 values of the rows at an integer index (...): (..., K), differentiable."""
        return nn.functional.embedding(index, self.codes_and_values()[1])

    def pack(self) -> PackedWeight:
        """The packed weight for inference, with bit for bit the same codes."""
        with torch.no_grad():
            codes, _ = self.codes_and_values()
            return PackedWeight.from_codes(codes, self.scales(), self.bits, self.group_size)


class HalfWeight(StoredDtypes):
    """A weight (O, K) stored in float16 and used in float32."""

    stored = ("packed",)

    def __init__(self, shape: tuple[int, int]) -> None:
        super().__init__()
        self.register_buffer("packed", torch.zeros(shape, dtype=torch.float16))
        self.packed: Tensor

    @classmethod
    def from_float(cls, weight: Tensor) -> HalfWeight:
        """Round a float weight (O, K) to float16.

        Raises:
            CalibrationError: if a value exceeds float16's range.
        """
        half = cls((weight.shape[0], weight.shape[1]))
        half.packed = weight.detach().to(torch.float16)
        if not bool(torch.isfinite(half.packed).all()):
            raise CalibrationError("a weight exceeds float16's range, 65,504")
        return half

    @property
    def shape(self) -> torch.Size:
        """(O, K)."""
        return self.packed.shape

    def rows(self, index: Tensor) -> Tensor:
        """float32 values of the rows at an integer index (...): (..., K)."""
        return nn.functional.embedding(index, self.packed).float()


def pack_weight(
    weight: Tensor, bits: int, group_size: int, per_tensor: bool = False
) -> PackedWeight:
    """Quantize a float weight (O, K) after training."""
    group_size = fit_group_size(group_size, weight.shape[1])
    scales = search_weight_scales(weight, bits, group_size, per_tensor)
    codes, _ = round_weight(weight.detach().float(), scales, group_size, bits)
    return PackedWeight.from_codes(codes, scales, bits, group_size)
