r"""INT4 weights whose later columns make up for the rounding errors of earlier ones (GPTQ).

Rounding a weight W (O, K) to W' changes its outputs for activations X (T, K) by

    ||X (W - W')^T||^2 = tr[(W - W') M (W - W')^T],    M = X^T X,

a sum of one quadratic form per row. Once column j is rounded, the best correction of the later
columns for its error e_j follows from the Cholesky factor of M^-1: with M^-1 = U^T U and U upper
triangular,

    e_j = (w_j - w'_j) / U_jj,    w_k <- w_k - e_j U_jk  for k > j.

M is damped to M + lambda 1, so that it has an inverse and the weights do not fit its noise.
Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers", ICLR 2023, eqs. 2 and 3 and section 3.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from bkcore.errors import CalibrationError
from bkcore.kernels.int4_levels import nearest_codes
from bkcore.quantization.storage import StoredDtypes
from bkcore.quantization.weights import (
    PackedWeight,
    each_column,
    pack_weight,
    search_weight_scales,
)

DAMPING = 0.01
"""lambda divided by the mean of M's diagonal; the paper's value."""

_ROWS_AT_ONCE = 256
"""If a layer is called with few rows at a time, they wait until there are this many: adding to M
costs K^2 steps, however few they are."""


class InputMoments(StoredDtypes):
    """Second moments M of a linear layer's K inputs, summed over tokens.

    Memory does not grow with the number of tokens: fewer than 256 rows wait until they are added.
    Each token is rounded to 8 bits relative to a
    power of two of its own, as finely as the integer product will see it. So all sums are exact,
    and do not depend on the order or on the number of processes, as long as the tokens' largest
    values lie within a factor of 2^19 / sqrt(tokens) of each other. Beyond that they round as
    float64 does.

    Attributes:
        second: (K, K) float64. While a layer is watched, the rows that wait are missing.
        tokens: () int64, tokens seen. Rows of zeros, such as padding, do not count.
    """

    stored = ("second",)

    def __init__(self, columns: int) -> None:
        super().__init__()
        self.register_buffer("second", torch.zeros(columns, columns, dtype=torch.float64))
        self.register_buffer("tokens", torch.zeros((), dtype=torch.int64))
        self.second: Tensor
        self.tokens: Tensor
        self._hook: RemovableHandle | None = None
        self._waiting: tuple[Tensor, ...] = ()

    @property
    def hook_id(self) -> int | None:
        """Id of its hook on the watched layer; None if it watches none."""
        return None if self._hook is None else self._hook.id

    def watch(self, layer: nn.Module) -> None:
        """Start observing the inputs of `layer`; `second` is complete after `unwatch`."""
        self._hook = layer.register_forward_pre_hook(lambda _, inputs: self._take(inputs[0]))

    def unwatch(self) -> None:
        """Stop observing."""
        self._add_waiting()
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def merge_processes(self) -> None:
        """Add up the moments of all processes of `torch.distributed`, if it is initialized."""
        self._add_waiting()
        if dist.is_available() and dist.is_initialized():
            second, tokens = self.second.clone(), self.tokens.clone()
            dist.all_reduce(second)
            dist.all_reduce(tokens)
            self.second, self.tokens = second, tokens

    def observe(self, x: Tensor) -> None:
        """Add the tokens of x (..., K).

        Raises:
            CalibrationError: if x is not finite; none of it is then counted.
        """
        self._take(x)
        self._add_waiting()

    @torch.no_grad()
    def _take(self, x: Tensor) -> None:
        rows = x.reshape(-1, x.shape[-1]).double()
        largest = rows.abs().amax(-1, keepdim=True)
        if not bool(torch.isfinite(largest).all()):
            raise CalibrationError(
                "the inputs of a linear layer are NaN or infinite; check the data, or the model"
            )
        step = torch.exp2(torch.frexp(largest).exponent.double() - 7)
        rows = (rows / step).round() * step
        # Replaced, not written to: the old value can come back if the forward pass fails later.
        if len(rows):
            self._waiting = (*self._waiting, rows)
        self.tokens = self.tokens + (largest > 0).sum()
        if sum(map(len, self._waiting)) >= _ROWS_AT_ONCE:
            self._add_waiting()

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> Any:
        self._add_waiting()  # before `second` moves to another device
        return super()._apply(fn, *args, **kwargs)

    def _add_waiting(self) -> None:
        if self._waiting:
            rows = torch.cat(self._waiting)
            self.second = self.second + rows.t() @ rows
            self._waiting = ()


def gptq(
    weight: Tensor,
    moments: Tensor,
    bits: int,
    group_size: int,
    *,
    per_tensor: bool = False,
    damping: float = DAMPING,
) -> tuple[Tensor, Tensor]:
    """Round a weight so that its outputs on the calibration data change little.

    The scales of a group are searched when its turn comes, on weights already corrected by the
    columns before, with each column weighted by its moment. A row for which plain rounding with
    `search_weight_scales` gives a smaller error is rounded that way instead, so no row gets worse
    on the calibration data.

    Args:
        weight: float (O, K), finite.
        moments: M, (K, K) float64.
        bits, group_size, per_tensor: as in `search_weight_scales`.
        damping: lambda divided by the mean of M's diagonal, positive.

    Returns:
        int8 codes (O, K) and storable float32 scales (O, G).

    Raises:
        CalibrationError: if the weight or M is not finite.
    """
    if not bool(torch.isfinite(moments).all()):
        raise CalibrationError("second moments hold NaN or infinity")
    weight = weight.detach().float()
    plain = pack_weight(weight, bits, group_size, per_tensor)
    codes, scales = plain.codes(), plain.scales()
    mean = moments.diagonal().mean()
    if mean == 0:
        return codes, scales
    moments = moments / mean
    factor = _factor_of_inverse(moments + damping * torch.eye(len(moments)).to(moments))
    found = _compensated(
        weight, factor, moments.diagonal().float(), bits, group_size, scales if per_tensor else None
    )
    better = _output_error(weight, *found, group_size, moments) < _output_error(
        weight, codes, scales, group_size, moments
    )
    codes, scales = (
        torch.where(better[:, None], new, old)
        for new, old in zip(found, (codes, scales), strict=True)
    )
    return codes, scales


def pack_weight_by_moments(
    weight: Tensor, moments: InputMoments, bits: int, group_size: int, per_tensor: bool = False
) -> PackedWeight:
    """Quantize a float weight (O, K) after training by `gptq`.

    Without any tokens, as for an expert that no token reached, this is `pack_weight`, and
    `tokens_seen` of the result is 0.
    """
    codes, scales = gptq(weight, moments.second, bits, group_size, per_tensor=per_tensor)
    packed = PackedWeight.from_codes(codes, scales, bits, group_size)
    packed.tokens_seen = int(moments.tokens)
    return packed


def _factor_of_inverse(moments: Tensor) -> Tensor:
    """U, upper triangular, with U^T U the inverse of a positive definite matrix."""
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(moments))
    return torch.linalg.cholesky(inverse, upper=True)


def _compensated(
    weight: Tensor,
    factor: Tensor,
    importance: Tensor,
    bits: int,
    group_size: int,
    scales: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """int8 codes (O, K) and scales (O, G), which are searched here unless given."""
    left = weight.double()
    codes, found = [], []
    for j in range(weight.shape[1]):
        group, first = divmod(j, group_size)
        if first == 0:
            columns = slice(j, j + group_size)
            found.append(
                search_weight_scales(
                    left[:, columns].float(), bits, group_size, importance=importance[columns]
                )
                if scales is None
                else scales[:, group : group + 1]
            )
        scale = found[-1][:, 0]
        code = nearest_codes(left[:, j].float() / scale, bits)
        error = (left[:, j] - scale * code) / factor[j, j]
        left[:, j:] -= error[:, None] * factor[j, j:]
        codes.append(code.to(torch.int8))
    return torch.stack(codes, 1), torch.cat(found, 1)


def _output_error(
    weight: Tensor, codes: Tensor, scales: Tensor, group_size: int, moments: Tensor
) -> Tensor:
    """(O,) float64: squared changes of the outputs, summed over the data."""
    values = codes * each_column(scales, group_size, weight.shape[1])
    change = (weight - values).double()
    return ((change @ moments) * change).sum(1)
