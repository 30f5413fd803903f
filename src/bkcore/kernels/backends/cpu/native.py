"""The C++ extension: whether it loaded, its instruction sets, and how tensors are passed to it.

It takes raw addresses. `bkcore.kernels.checks` has checked shapes, dtypes and devices before a
tensor gets here, and the extension checks the size of its memory (csrc/arguments.h).
"""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from bkcore.arguments import did_you_mean
from bkcore.errors import BackendError
from bkcore.host import last_level_cache

INTERFACE = 2
"""Version of the extension's interface. Every change of its functions' arguments or results raises
it, here and in csrc/module.cpp, so that an extension built for other Python code is recognized."""


def _load() -> tuple[Any, str]:
    """The extension; or None, and why it cannot be used."""
    try:
        native = importlib.import_module("bkcore.kernels.backends.cpu._native")
    except ImportError as error:
        return None, str(error)
    found = getattr(native, "__interface__", None)
    if found != INTERFACE:
        return None, f"it has interface {found}, but this Python code needs {INTERFACE}"
    return native, ""


_native, _import_error = _load()

_supported: tuple[str, ...] = () if _native is None else tuple(_native.supported_isas())
_forced_isa = os.environ.get("BKCORE_CPU_ISA")
_sequential = False

CACHE_BYTES = last_level_cache() or 32 << 20
"""Outputs larger than this are written with stores that bypass the caches."""


def absent() -> str | None:
    """Why the extension cannot be used, with what to do about it; None if it can."""
    if _native is not None:
        return None
    return (
        f"the native extension {__package__}._native did not load ({_import_error}); reinstall "
        "bkcore with a C++17 compiler on the path: pip install --force-reinstall --no-deps bkcore "
        "(in a checkout, -e . in place of bkcore)"
    )


def refuses(v: Tensor) -> str | None:
    if v.device.type != "cpu":
        return f"it takes CPU tensors, not {v.device.type}; move them, or choose 'reference'"
    return None


def describe() -> tuple[str | None, int | None]:
    """The instruction set in use, and the number of threads."""
    if _native is None:
        return None, None
    return isa(), torch.get_num_threads() if has_openmp() else 1


def supported_isas() -> tuple[str, ...]:
    """The compiled instruction sets that this processor supports, best first."""
    return _supported


def isa() -> str:
    """The instruction set in use: the best one, unless `use_isa` or BKCORE_CPU_ISA (read when
    bkcore is imported) selects another."""
    if _forced_isa is None:
        return _supported[0]
    if _forced_isa not in _supported:
        raise BackendError(
            f"instruction set {_forced_isa!r} is not available; choose from "
            f"{', '.join(_supported)}{did_you_mean(_forced_isa, _supported)}"
        )
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


@contextlib.contextmanager
def sequential() -> Iterator[None]:
    """Sweep few, long chains site by site in every thread, instead of in blocks; for tests and
    measurements."""
    global _sequential
    before, _sequential = _sequential, True
    try:
        yield
    finally:
        _sequential = before


def is_sequential() -> bool:
    return _sequential


def is_cut_into_blocks(chains: int, sites: int) -> bool:
    """Whether this many chains of this many sites are swept in blocks, which round differently."""
    return bool(_native.few_and_long(chains, sites)) and not _sequential


def rows_per_share() -> int:
    """How many rows' gradients are summed one after the other."""
    rows: int = _native.rows_per_share
    return rows


_PLAIN = (int, float, bool, type(None))
"""What is no tensor. `isinstance` would ask PyTorch, which takes longer than all else here."""


def call(name: str, *bundles: Any, **arguments: Any) -> Any:
    """Call a function of the extension, with the instruction set and the threads in force.

    Args:
        bundles: arguments or results of an operator, handed over by their names, and the contiguous
            tensors among them as buffers.
        arguments: all others, as the extension takes them.
    """
    for bundle in bundles:  # into the one dict that there is: another would have to be made
        for field, x in zip(bundle._fields, bundle, strict=True):
            assert field not in arguments
            arguments[field] = x if type(x) in _PLAIN else (x.data_ptr(), x.nbytes)
    arguments["isa"], arguments["threads"] = isa(), torch.get_num_threads()
    return getattr(_native, name)(arguments)


# A contiguous tensor is passed as address and size in bytes. An empty tensor has no address.
Buffer = tuple[int, int]

# Any other is passed as address, bytes per number, and sizes and strides of batch, site, part and
# lane. A stride of 0 means that the tensor does not have this axis.
Layout = tuple[int, int, tuple[int, ...], tuple[int, ...]]


def buffer(x: Tensor | None) -> Buffer | None:
    return None if x is None else (x.data_ptr(), x.nbytes)


def sequence(x: Tensor | None) -> Layout | None:
    """(B, N, H)."""
    if x is None:
        return None
    (batch, sites, lanes), (by_batch, by_site, by_lane) = x.shape, x.stride()
    return _layout(x, (batch, sites, 1, lanes), (by_batch, by_site, 0, by_lane))


def row(x: Tensor) -> Layout:
    """(H,)."""
    return _layout(x, (1, 1, 1, *x.shape), (0, 0, 0, *x.stride()))


def rows(x: Tensor) -> Layout:
    """(R, H), R = 1 for all sites."""
    (sites, lanes), (by_site, by_lane) = x.shape, x.stride()
    return _layout(x, (1, sites, 1, lanes), (0, by_site if sites > 1 else 0, 0, by_lane))


def rows_of_parts(x: Tensor) -> Layout:
    """(C, R, H), R = 1 for all sites."""
    (parts, sites, lanes), (by_part, by_site, by_lane) = x.shape, x.stride()
    return _layout(x, (1, sites, parts, lanes), (0, by_site if sites > 1 else 0, by_part, by_lane))


def sequence_of_parts(x: Tensor) -> Layout:
    """(B, N, C, H)."""
    return _layout(x, tuple(x.shape), x.stride())


def _layout(x: Tensor, sizes: tuple[int, ...], strides: tuple[int, ...]) -> Layout:
    return x.data_ptr(), x.itemsize, sizes, strides
