"""Error metrics."""

from __future__ import annotations

import math

import pytest
import torch

from bkcore.quantization.metrics import error_metrics


def test_values_by_hand():
    metrics = error_metrics(torch.tensor([1.0, -3.0]), torch.tensor([1.5, -2.5]))
    assert set(metrics) == {"mae", "mse", "snr_db", "relative_error_percent"}
    assert metrics["mae"] == 0.5
    assert metrics["mse"] == 0.25
    assert metrics["snr_db"] == pytest.approx(10 * math.log10(5 / 0.25))
    assert metrics["relative_error_percent"] == pytest.approx(25.0)


def test_no_error_is_infinitely_clean():
    x = torch.randn(5)
    metrics = error_metrics(x, x)
    assert metrics["snr_db"] == math.inf
    assert metrics["mae"] == metrics["relative_error_percent"] == 0


def test_noise_on_silence():
    metrics = error_metrics(torch.zeros(3), torch.ones(3))
    assert metrics["snr_db"] == -math.inf
    assert math.isfinite(metrics["relative_error_percent"])


def test_nan_is_not_hidden():
    metrics = error_metrics(torch.ones(2), torch.tensor([1.0, torch.nan]))
    assert all(math.isnan(value) for value in metrics.values())
