"""New memory that nobody has written is full of NaN, or of the largest integer.

A kernel that forgets to write an element then gives a wrong result always, not only where the
memory held something else before. PyTorch can do this itself in its deterministic mode, but then it
also takes other algorithms: sums over indices in one thread, other kernels on a GPU, other code
from the compiler. The tests must run what users run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor


def _poison_tensor(x: Tensor) -> Tensor:
    real = type(x) is Tensor and not x.is_meta  # not one of a compiler, which holds nothing
    if not real or x.layout != torch.strided or x.is_quantized or not x.numel():
        return x
    value: complex
    if x.is_complex():
        value = complex("nan+nanj")
    elif x.is_floating_point():
        value = torch.nan
    else:
        value = 1 if x.dtype == torch.bool else torch.iinfo(x.dtype).max
    with torch.no_grad():
        x.fill_(value)
    return x


def _poison_array(x: np.ndarray) -> np.ndarray:
    if x.dtype.kind in "fc":
        x.fill(complex("nan+nanj") if x.dtype.kind == "c" else np.nan)
    elif x.dtype.kind in "iu":
        x.fill(np.iinfo(x.dtype).max)
    return x


def _then(poison: Callable[[Any], Any], make: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(make)
    def poisoned(*args: Any, **kwargs: Any) -> Any:
        return poison(make(*args, **kwargs))

    return poisoned


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Poison what `torch.empty`, `np.empty` and their kin make inside of the block.

    Other processes, and what C++ code makes, stay as they are; for the kernels' scratch memory see
    csrc/threads.h.
    """
    with torch.device("cpu"):
        torch.empty(0)  # PyTorch notes which functions take a device, the real ones
    makers: list[tuple[Any, str]] = [
        (torch, name) for name in ("empty", "empty_like", "empty_strided", "empty_permuted")
    ]
    makers += [(Tensor, name) for name in ("new_empty", "new_empty_strided")]
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in makers:
            patch.setattr(owner, name, _then(_poison_tensor, getattr(owner, name)))
        for name in ("empty", "empty_like"):
            patch.setattr(np, name, _then(_poison_array, getattr(np, name)))
        yield
