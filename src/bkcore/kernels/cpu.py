"""The sweep in C++ for CPU tensors: vectorized over lanes, parallel over batch and lanes.

The extension takes raw addresses. `bkcore.kernels.checks` has seen to shapes, dtypes and devices
before a tensor comes here, and the extension looks at how much memory there is.
"""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bkcore.errors import BackendError, InputError
from bkcore.kernels import reference
from bkcore.kernels.backend import (
    ATTENTION_CHUNK,
    Backend,
    Gradients,
    empty_like_sites,
    empty_parts,
    ordered_sum,
)
from bkcore.kernels.checks import ChannelRounding

_native: Any = None
_import_error = ""
try:
    _native = importlib.import_module("bkcore.kernels._native")
except ImportError as error:
    _import_error = str(error)


def last_level_cache() -> int:
    """Bytes of the last-level cache; 32 MiB where the system does not tell."""
    folder = Path("/sys/devices/system/cpu/cpu0/cache")
    sizes = [path.read_text(encoding="utf-8").strip() for path in folder.glob("index*/size")]
    return max((int(s[:-1]) << {"K": 10, "M": 20}[s[-1]] for s in sizes), default=32 << 20)


_supported: tuple[str, ...] = () if _native is None else tuple(_native.supported_isas())
_forced_isa = os.environ.get("BKCORE_CPU_ISA")
# Outputs beyond this size are written past the caches.
_cache_bytes = last_level_cache()
_sequential = False


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


@contextlib.contextmanager
def sequential() -> Iterator[None]:
    """Sweep few, long chains site by site in every thread, instead of cut into blocks: for tests
    and measurements."""
    global _sequential
    before, _sequential = _sequential, True
    try:
        yield
    finally:
        _sequential = before


def sweep(
    v: Tensor,
    source: Tensor | None,
    energy: Tensor,
    eta: Tensor,
    hopping: Tensor,
    two_sided: bool,
) -> Tensor:
    parts = empty_parts(v, 2 if source is None else 4)
    _native.sweep(
        isa(),
        torch.get_num_threads(),
        v.dtype == torch.float64,
        two_sided,
        _sequential,
        _cache_bytes,
        tuple(v.shape),
        _sequence(v),
        _sequence(source),
        _row(energy),
        _parameter(eta),
        _parameter(hopping),
        _parts(parts),
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
    dv = empty_like_sites(parts)
    dsource = None if source is None else empty_like_sites(parts)
    # One partial sum for each batch element, so that the result does not depend on which thread
    # worked on which element. The kernel adds to the ones that all sites share.
    denergy = parts.new_zeros(batch, 1, lanes)
    deta = parts.new_zeros(batch, *eta.shape)
    dhopping = parts.new_zeros(batch, *hopping.shape)
    _native.sweep_backward(
        isa(),
        torch.get_num_threads(),
        parts.dtype == torch.float64,
        two_sided,
        _cache_bytes,
        (batch, sites, lanes),
        _sequence(v),
        _sequence(source),
        _row(energy),
        _parameter(eta),
        _parameter(hopping),
        _parts(parts),
        _parts(grad),
        _sequence(dv),
        _sequence(dsource),
        _sequence(denergy),
        _sequence(deta),
        _sequence(dhopping),
    )
    return dv, dsource, ordered_sum(denergy)[0], ordered_sum(deta), ordered_sum(dhopping)


def sweep_codes(
    v: Tensor,
    source: Tensor | None,
    energy: Tensor,
    eta: Tensor,
    hopping: Tensor,
    in_scale: Tensor,
    in_zero: Tensor,
    out_scale: Tensor,
    out_zero: Tensor,
    in_levels: Tensor | None,
    out_bounds: Tensor | None,
    bits: int,
    two_sided: bool,
) -> Tensor:
    batch, sites, row = v.shape
    codes = v.new_empty(batch, sites, out_scale.shape[0], row)
    _native.sweep_codes(
        isa(),
        torch.get_num_threads(),
        two_sided,
        bits,
        (batch, sites, energy.shape[0]),
        *_buffers(v, source, codes),
        _row(energy),
        _parameter(eta),
        _parameter(hopping),
        *(_quantizer(x) for x in (in_scale, in_zero, out_scale, out_zero)),
        *_buffers(in_levels, out_bounds),
    )
    return codes


def sweep_rounded(
    v: Tensor,
    energy: Tensor,
    eta: Tensor,
    hopping: Tensor,
    scale: Tensor,
    zero: Tensor,
    levels: Tensor | None,
    bounds: Tensor | None,
    group_size: int,
    bits: int,
    two_sided: bool,
) -> Tensor:
    batch, sites, lanes = v.shape
    if _native.few_and_long(batch * lanes, sites) and not _sequential:
        # These are swept in blocks, which round differently in the last bit.
        return reference.sweep_rounded(
            v,
            energy,
            eta,
            hopping,
            scale,
            zero,
            levels,
            bounds,
            group_size,
            bits,
            two_sided,
            sweep,
        )
    parts = empty_parts(v, 2)
    _native.sweep_rounded(
        isa(),
        torch.get_num_threads(),
        two_sided,
        bits,
        group_size,
        tuple(v.shape),
        _sequence(v),
        _row(energy),
        _parameter(eta),
        _parameter(hopping),
        _parts(parts),
        *_buffers(scale, zero, levels, bounds),
    )
    return parts


def product(x: Tensor, weight: Tensor, scales: Tensor, group_size: int, bits: int) -> Tensor:
    inputs, outputs = x.shape[-1], weight.shape[0]
    out = x.new_empty(*x.shape[:-1], outputs)
    _native.product(
        isa(),
        torch.get_num_threads(),
        bits,
        (x.numel() // inputs, inputs, outputs, group_size),
        _buffers(x, weight, scales, out),
    )
    return out


def round_channels(
    x: Tensor,
    scale: Tensor,
    zero: Tensor,
    levels: Tensor | None,
    group_size: int,
    bits: int,
) -> Tensor:
    out = torch.empty_like(x)
    channels = x.shape[-1]
    _native.round_channels(
        isa(),
        torch.get_num_threads(),
        bits,
        (x.numel() // max(channels, 1), channels),
        (*_buffers(scale, zero, levels), group_size),
        *_buffers(x, out),
    )
    return out


def round_channels_backward(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    zero: Tensor,
    levels: Tensor | None,
    group_size: int,
    bits: int,
) -> tuple[Tensor, Tensor, Tensor | None]:
    channels = x.shape[-1]
    rows = x.numel() // max(channels, 1)
    # Sums over rows are taken in shares of fixed size, so that they do not depend on the threads.
    shares = -(-rows // _native.rows_per_share)
    dx, dscale = torch.empty_like(x), x.new_zeros(shares, channels)
    dlevels = None if levels is None else x.new_zeros(shares, 2**bits)
    _native.round_channels_backward(
        isa(),
        torch.get_num_threads(),
        bits,
        (rows, channels),
        (*_buffers(scale, zero, levels), group_size),
        _buffers(grad, x, dx, dscale, dlevels),
    )
    return dx, ordered_sum(dscale), None if dlevels is None else ordered_sum(dlevels)


def round_rows(x: Tensor) -> Tensor:
    out, count = torch.empty_like(x), x.shape[-1]
    _native.round_rows(isa(), torch.get_num_threads(), x.numel() // count, count, *_buffers(x, out))
    return out


def round_weight(
    weight: Tensor, scale: Tensor, group_size: int, bits: int
) -> tuple[Tensor, Tensor]:
    codes, values = torch.empty_like(weight, dtype=torch.int8), torch.empty_like(weight)
    _native.round_weight(
        isa(),
        torch.get_num_threads(),
        bits,
        (*weight.shape, group_size),
        _buffers(weight, scale, codes, values),
    )
    return codes, values


def round_weight_backward(
    grad: Tensor, weight: Tensor, scale: Tensor, group_size: int, bits: int
) -> tuple[Tensor, Tensor]:
    by_weight, by_scale = torch.empty_like(weight), weight.new_empty(scale.shape)
    _native.round_weight_backward(
        isa(),
        torch.get_num_threads(),
        bits,
        (*weight.shape, group_size),
        _buffers(weight, scale, grad, by_weight, by_scale),
    )
    return by_weight, by_scale


def step(
    state: Tensor,
    v: Tensor,
    source: Tensor | None,
    energy: Tensor,
    eta: Tensor,
    hopping: Tensor,
) -> None:
    batch, _, lanes = state.shape
    _native.step(
        isa(),
        state.dtype == torch.float64,
        (batch, lanes),
        *_buffers(v, source, energy, eta, hopping, state),
    )


def attention(
    v: Tensor,
    hopping: Tensor,
    energy: Tensor,
    eta: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    first_g: Tensor | None,
    first_psi: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, sites, heads, keys = query.shape
    values = value.shape[3]
    g = v.new_empty(batch, sites, heads, 2)
    out = v.new_empty(batch, sites, heads, 2, values)
    psi = v.new_empty(batch, heads, 2, keys, values)
    chunks = -(-sites // ATTENTION_CHUNK) if keep else 0
    checkpoints = v.new_empty(batch, heads, chunks, 2, keys, values)
    inputs = (v, hopping, energy, eta, query, key, value, first_g, first_psi)
    _native.attention(
        isa(),
        torch.get_num_threads(),
        v.dtype == torch.float64,
        (batch, sites, heads, keys, values, ATTENTION_CHUNK),
        _buffers(*inputs),
        _buffers(g, out, psi, checkpoints if keep else None),
    )
    return g, out, psi, checkpoints


def recall_step(
    inputs: Sequence[Tensor], rounding: Sequence[ChannelRounding]
) -> tuple[Tensor, Tensor, Tensor]:
    """What `bkcore.kernels.recall` says, of checked, contiguous tensors in its order.

    Raises:
        InputError: an eta is not positive.
    """
    value, first_g, first_psi = inputs[4], inputs[9], inputs[10]
    batch, heads, _, keys, values = first_psi.shape
    groups = inputs[2].shape[-1] // keys
    features = torch.empty_like(value)
    g, psi = torch.empty_like(first_g), torch.empty_like(first_psi)
    computed = _native.recall_step(
        isa(),
        torch.get_num_threads(),
        rounding[0].bits if rounding else 8,
        (batch, heads, groups, keys, values),
        _buffers(*inputs),
        [(*_buffers(part.scale, part.zero, part.levels), part.group_size) for part in rounding],
        _buffers(features, g, psi),
    )
    if not computed:
        raise InputError(
            f"eta must be > 0, got {float(inputs[7].min())}: the resolvent is taken in the upper "
            "half plane; give the energy a positive imaginary part"
        )
    return features, g, psi


def attention_backward(
    dg: Tensor,
    dout: Tensor,
    dpsi: Tensor,
    v: Tensor,
    hopping: Tensor,
    energy: Tensor,
    eta: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    first_g: Tensor | None,
    g: Tensor,
    checkpoints: Tensor,
) -> tuple[Tensor, ...]:
    batch, sites, heads, keys = query.shape
    values = value.shape[3]
    # One partial sum for each chain, so that the result does not depend on the threads.
    denergy, deta = v.new_empty(batch, heads), v.new_empty(batch, heads)
    dv, dhopping = torch.empty_like(v), torch.empty_like(v)
    dquery, dkey, dvalue = (torch.empty_like(x) for x in (query, key, value))
    dfirst_g, dfirst_psi = v.new_empty(batch, heads, 2), torch.empty_like(dpsi)
    _native.attention_backward(
        isa(),
        torch.get_num_threads(),
        v.dtype == torch.float64,
        (batch, sites, heads, keys, values, ATTENTION_CHUNK),
        _buffers(v, hopping, energy, eta, query, key, value, first_g, None),
        *_buffers(g, checkpoints),
        _buffers(dg, dout, dpsi),
        _buffers(dv, dhopping, denergy, deta, dquery, dkey, dvalue, dfirst_g, dfirst_psi),
    )
    denergy, deta = ordered_sum(denergy), ordered_sum(deta)
    return dv, dhopping, denergy, deta, dquery, dkey, dvalue, dfirst_g, dfirst_psi


# What the extension takes for a contiguous tensor (csrc/buffers.h): address and bytes. An empty
# tensor has no address either.
_Buffer = tuple[int, int]
_NONE: _Buffer = (0, -1)


def _buffers(*tensors: Tensor | None) -> list[_Buffer]:
    return [_NONE if x is None else (x.data_ptr(), x.nbytes) for x in tensors]


# For any other: address, bytes of a number, and sizes and strides of batch, site, part and lane.
# A stride of 0 is an axis that it lacks.
_Layout = tuple[int, int, tuple[int, ...], tuple[int, ...]]


def _layout(x: Tensor, sizes: tuple[int, ...], strides: tuple[int, ...]) -> _Layout:
    return x.data_ptr(), x.itemsize, sizes, strides


def _sequence(x: Tensor | None) -> _Layout:
    if x is None:
        return 0, 0, (0, 0, 0, 0), (0, 0, 0, 0)
    (batch, sites, lanes), (by_batch, by_site, by_lane) = x.shape, x.stride()
    return _layout(x, (batch, sites, 1, lanes), (by_batch, by_site, 0, by_lane))


def _row(x: Tensor) -> _Layout:
    return _layout(x, (1, 1, 1, *x.shape), (0, 0, 0, *x.stride()))


def _parameter(x: Tensor) -> _Layout:
    (rows, lanes), (by_row, by_lane) = x.shape, x.stride()
    return _layout(x, (1, rows, 1, lanes), (0, by_row if rows > 1 else 0, 0, by_lane))


def _quantizer(x: Tensor) -> _Layout:
    (parts, rows, lanes), (by_part, by_row, by_lane) = x.shape, x.stride()
    return _layout(x, (1, rows, parts, lanes), (0, by_row if rows > 1 else 0, by_part, by_lane))


def _parts(x: Tensor) -> _Layout:
    return _layout(x, tuple(x.shape), x.stride())


BACKEND = Backend(
    name="cpu",
    absent=absent,
    refuses=refuses,
    describe=_describe,
    sweep=sweep,
    sweep_backward=sweep_backward,
    sweep_codes=sweep_codes,
    sweep_rounded=sweep_rounded,
    product=product,
    round_channels=round_channels,
    round_channels_backward=round_channels_backward,
    round_rows=round_rows,
    round_weight=round_weight,
    round_weight_backward=round_weight_backward,
    step=step,
    attention=attention,
    attention_backward=attention_backward,
)
