"""How far a quantized tensor is from the float one."""

from __future__ import annotations

import math

from torch import Tensor


def error_metrics(reference: Tensor, quantized: Tensor) -> dict[str, float]:
    """Error of `quantized` against `reference`, two real tensors of equal shape.

    Returns:
        `mae` and `mse`: mean absolute and mean squared error; `snr_db`: signal to noise in
        decibels, infinite if there is no error; `relative_error_percent`: mean |error| over mean
        |reference|, in percent.
    """
    reference, quantized = reference.detach().double(), quantized.detach().double()
    error = quantized - reference
    mae = float(error.abs().mean())
    mse = float(error.square().mean())
    power = float(reference.square().mean())
    magnitude = float(reference.abs().mean())
    return {
        "mae": mae,
        "mse": mse,
        "snr_db": _decibels(power, mse),
        "relative_error_percent": 100 * mae / magnitude if magnitude else 100 * mae,
    }


def _decibels(power: float, noise: float) -> float:
    if noise == 0:
        return math.inf
    return 10 * math.log10(power / noise) if power else -math.inf
