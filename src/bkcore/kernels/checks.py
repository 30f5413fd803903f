"""Checks that every operator makes of its arguments before a backend gets them.

A tensor that passes becomes a raw address: its shape, dtype, device and layout are all that a
kernel knows about its memory. In every operator, a wrong shape raises `ShapeError`, a wrong dtype
`DTypeError`, and a wrong device `InputError`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from bkcore.arguments import check_group_size
from bkcore.errors import DTypeError, InputError, ShapeError
from bkcore.reading import shown

Expected = tuple[Tensor | None, tuple[int, ...], torch.dtype]
"""A tensor, or None if not given, and the shape and dtype it must have."""


def check_tensors(
    expected: Mapping[str, Expected], device: torch.device, why: str | Callable[[], str] = ""
) -> None:
    """Raise unless every tensor is strided, on the device, and of the expected shape and dtype.

    Args:
        expected: the tensors with their shapes and dtypes, by name.
        device: where they must be.
        why: where the shapes and dtypes come from, such as "for 5 channels"; or a function that
            returns this, called only if something is wrong.

    Raises:
        ShapeError, DTypeError, InputError: as at the top of this module.
    """
    for name, (x, shape, dtype) in expected.items():
        if x is None:
            continue
        if x.shape != shape or x.dtype != dtype or x.device != device or x.layout != torch.strided:
            raise _misfit(name, x, shape, dtype, device, why if isinstance(why, str) else why())


def _misfit(
    name: str, x: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, why: str
) -> Exception:
    why = why and f" {why}"
    if x.dtype != dtype:
        return DTypeError(f"{name} must be {dtype}{why}, not {x.dtype}")
    if x.shape != shape:
        return ShapeError(f"{name} must be {tuple(shape)}{why}, not {tuple(x.shape)}")
    if x.device != device:
        return InputError(f"{name} is on {x.device} but the others are on {device}; move one")
    return InputError(f"{name} must be dense, not {x.layout}; pass {name}.to_dense()")


def check_plain(name: str, x: Tensor) -> None:
    """Raise `ShapeError` unless x is contiguous in memory, without a lazy negation."""
    if not x.is_contiguous() or x.is_neg():
        raise ShapeError(
            f"{name} must be contiguous in memory; pass {name}.contiguous(), or "
            f"{name}.resolve_neg() for the imaginary part of a conjugate"
        )


def check_no_gradient(
    function: str, instead: str, tensors: Iterable[tuple[str, Tensor | None]]
) -> None:
    """Raise `InputError` if one of the tensors requires a gradient, which a function without a
    derivative would lose."""
    if not torch.is_grad_enabled():
        return
    for name, x in tensors:
        if x is not None and x.requires_grad:
            raise InputError(
                f"{function} has no derivative, and {name} requires one: call it under "
                f"torch.no_grad(), or use {instead}"
            )


def not_positive(name: str, smallest: float) -> InputError:
    """The error for an eta, or Im z, that is not positive."""
    return InputError(
        f"{name} must be > 0, not {smallest}; the resolvent is taken in the upper half-plane; "
        "give the energy a positive imaginary part, such as z = 1j"
    )


def check_bits(bits: int) -> None:
    """Raise `InputError` unless codes can have this many bits."""
    if type(bits) is not int or bits not in (4, 8):
        raise InputError(f"bits must be 4 or 8, not {shown(bits)}")


def fit_group_size(group_size: int, size: int) -> int:
    """Limit the group size to the number of channels, which is one group.

    Every group size passes through here, so that a huge one takes no memory and overflows nothing.

    Raises:
        InputError: unless the group size is an integer of at least 1.
    """
    check_group_size(group_size)
    return min(group_size, max(size, 1))


def count_groups(size: int, group_size: int) -> int:
    """How many groups the channels make, including a smaller last one."""
    return -(-size // group_size)


def check_rounding(
    channels: int,
    device: torch.device,
    scale: Tensor,
    zero: Tensor,
    levels: Tensor | None,
    group_size: int,
    bits: int,
) -> int:
    """Raise unless these can round this many channels by `round_channels`; return the fitting group
    size."""
    check_bits(bits)
    group_size = fit_group_size(group_size, channels)
    groups = (count_groups(channels, group_size),)
    check_tensors(
        {"scale": (scale, groups, torch.bfloat16), "zero": (zero, groups, torch.int8)},
        device,
        lambda: f"for {channels} channels in groups of {group_size}",
    )
    check_levels("levels", levels, (2**bits,), device, bits)
    return group_size


def check_levels(
    name: str, levels: Tensor | None, shape: tuple[int, ...], device: torch.device, bits: int
) -> None:
    """Raise unless levels, if given, are float32 of this shape on the device."""
    check_tensors(
        {name: (levels, shape, torch.float32)},
        device,
        lambda: f"with a level for every code of {bits} bits",
    )
