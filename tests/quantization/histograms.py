"""What the tests of histograms and of ranges share."""

from __future__ import annotations

import torch
from torch import Tensor

from bkcore.quantization.observers import HistogramObserver


def observed(*batches: Tensor) -> HistogramObserver:
    """An observer of (M,) batches as one group."""
    observer = HistogramObserver(1)
    for batch in batches:
        observer.observe(batch[:, None], torch.zeros(1, dtype=torch.int64))
    return observer
