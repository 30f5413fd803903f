"""The sweep in C++ for CPU tensors: vectorized over lanes, parallel over batch and lanes.

The extension takes raw addresses. `bkcore.kernels.ops` has checked shapes, dtypes and devices and
made everything contiguous before a tensor comes here.
"""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from bkcore.errors import BackendError
from bkcore.kernels.backend import Backend, Gradients, ordered_sum

_native: Any = None
_import_error = ""
try:
    _native = importlib.import_module("bkcore.kernels._native")
except ImportError as error:
    _import_error = str(error)

_supported: tuple[str, ...] = () if _native is None else tuple(_native.supported_isas())
_forced_isa = os.environ.get("BKCORE_CPU_ISA")


def absent() -> str | None:
    """Why the extension cannot be used, with what to do about it; None if it can."""
    if _native is not None:
        return None
    return (
        f"the native extension bkcore.kernels._native did not load ({_import_error}); reinstall "
        "bkcore with a C++17 compiler on the path: pip install --force-reinstall --no-deps bkcore"
    )


def refuses(v: Tensor) -> str | None:
    if v.device.type != "cpu":
        return f"it takes CPU tensors, not {v.device.type}: move them, or choose 'reference'"
    return None


def supported_isas() -> tuple[str, ...]:
    """Instruction sets compiled in that this processor has, the best first."""
    return _supported


def isa() -> str:
    """The instruction set in use: the best one, unless `use_isa` or BKCORE_CPU_ISA (read when
    bkcore is imported) names another."""
    if _forced_isa is None:
        return _supported[0]
    if _forced_isa not in _supported:
        known = ", ".join(_supported)
        raise BackendError(f"instruction set {_forced_isa!r} is not available; there are: {known}")
    return _forced_isa


@contextlib.contextmanager
def use_isa(name: str) -> Iterator[None]:
    """Force an instruction set in every thread, for tests and measurements."""
    global _forced_isa
    before, _forced_isa = _forced_isa, name
    try:
        isa()
        yield
    finally:
        _forced_isa = before


def has_openmp() -> bool:
    return _native is not None and bool(_native.openmp)


def _describe() -> tuple[str | None, int | None]:
    if _native is None:
        return None, None
    return isa(), torch.get_num_threads() if has_openmp() else 1


def sweep(
    v: Tensor,
    source: Tensor | None,
    energy: Tensor,
    eta: Tensor,
    hopping: Tensor,
    two_sided: bool,
) -> Tensor:
    batch, sites, lanes = v.shape
    parts = v.new_empty(batch, sites, 2 if source is None else 4, lanes)
    _native.sweep(
        isa(),
        torch.get_num_threads(),
        v.dtype == torch.float64,
        two_sided,
        (batch, sites, lanes),
        (eta.shape[0], hopping.shape[0]),
        v.data_ptr(),
        _address(source),
        energy.data_ptr(),
        eta.data_ptr(),
        hopping.data_ptr(),
        parts.data_ptr(),
    )
    return parts


def sweep_backward(
    grad: Tensor,
    parts: Tensor,
    v: Tensor | None,
    source: Tensor | None,
    energy: Tensor,
    eta: Tensor,
    hopping: Tensor,
    two_sided: bool,
) -> Gradients:
    batch, sites, _, lanes = parts.shape
    dv = parts.new_empty(batch, sites, lanes)
    dsource = None if source is None else torch.empty_like(dv)
    # The kernel adds to these, one partial sum for each batch element, so that the result does
    # not depend on which thread worked on which element.
    denergy = parts.new_zeros(batch, lanes)
    deta = parts.new_zeros(batch, *eta.shape)
    dhopping = parts.new_zeros(batch, *hopping.shape)
    _native.sweep_backward(
        isa(),
        torch.get_num_threads(),
        parts.dtype == torch.float64,
        two_sided,
        (batch, sites, lanes),
        (eta.shape[0], hopping.shape[0]),
        _address(v),
        _address(source),
        energy.data_ptr(),
        eta.data_ptr(),
        hopping.data_ptr(),
        parts.data_ptr(),
        grad.data_ptr(),
        dv.data_ptr(),
        _address(dsource),
        denergy.data_ptr(),
        deta.data_ptr(),
        dhopping.data_ptr(),
    )
    return dv, dsource, ordered_sum(denergy), ordered_sum(deta), ordered_sum(dhopping)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


BACKEND = Backend(
    name="cpu",
    absent=absent,
    refuses=refuses,
    describe=_describe,
    sweep=sweep,
    sweep_backward=sweep_backward,
)
