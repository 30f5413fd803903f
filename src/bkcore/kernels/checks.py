"""What every operator asks of its arguments, below the backends.

A tensor that passes here becomes an address: its shape, dtype, device and layout are all that a
kernel knows of its memory. A wrong shape is a `ShapeError`, a wrong dtype a `DTypeError`, and a
wrong device an `InputError`, in every operator.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from bkcore.errors import DTypeError, InputError, ShapeError
from bkcore.reading import shown

Expected = tuple[Tensor | None, tuple[int, ...], torch.dtype]
"""A tensor, or None for one that was not given, and the shape and dtype that it should have."""


def check_tensors(
    expected: Mapping[str, Expected], device: torch.device, why: str | Callable[[], str] = ""
) -> None:
    """Raise unless every tensor has its shape and dtype, and is a strided one on the device.

    Args:
        expected: by name.
        why: where the shapes and dtypes come from, such as "for 5 channels"; a function is called
            only if something is wrong.

    Raises:
        ShapeError, DTypeError, InputError: as in this module's text.
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
        return DTypeError(f"{name} must be {dtype}{why}, got {x.dtype}")
    if x.shape != shape:
        return ShapeError(f"{name} must be {tuple(shape)}{why}, got {tuple(x.shape)}")
    if x.device != device:
        return InputError(f"{name} is on {x.device} but the others are on {device}; move one")
    return InputError(f"{name} has the layout {x.layout}: pass {name}.to_dense()")


def check_plain(name: str, x: Tensor) -> None:
    """Raise `ShapeError` unless the numbers of x lie in memory as they are, one after the other."""
    if not x.is_contiguous() or x.is_neg():
        raise ShapeError(
            f"{name} must be contiguous in memory: pass {name}.contiguous(), or "
            f"{name}.resolve_neg() for the imaginary part of a conjugate"
        )


def not_positive(name: str, smallest: float) -> InputError:
    """What to raise for a width of energies that is not positive."""
    return InputError(
        f"{name} must be > 0, got {smallest}: the resolvent is taken in the upper half plane; "
        "give the energy a positive imaginary part, such as z = 1j"
    )


def check_bits(bits: int) -> None:
    """Raise `InputError` unless codes can have so many bits."""
    if type(bits) is not int or bits not in (4, 8):
        raise InputError(f"bits must be 4 or 8, not {shown(bits)}")


def check_group_size(group_size: int) -> None:
    """Raise `InputError` unless `group_size` is an integer of at least 1."""
    if isinstance(group_size, bool) or not isinstance(group_size, int) or group_size < 1:
        raise InputError(
            f"group_size must be an integer >= 1, not {shown(group_size)}; "
            "1 gives every channel its own scale"
        )


def fit_group_size(group_size: int, size: int) -> int:
    """The group size for so many channels: no more than there are, which is one group.

    Whatever has a group size takes it through here, so that a large one costs no memory and
    overflows nothing.

    Raises:
        InputError: as `check_group_size`.
    """
    check_group_size(group_size)
    return min(group_size, max(size, 1))


def count_groups(size: int, group_size: int) -> int:
    """Groups of so many channels, a smaller last one included."""
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
    """Raise unless these round so many channels, as `round_channels` says; the group size
    that fits them."""
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
    """Raise unless levels, if there are any, are float32 of this shape on the device."""
    check_tensors(
        {name: (levels, shape, torch.float32)},
        device,
        lambda: f"with a level for every code of {bits} bits",
    )


@dataclass(frozen=True)
class ChannelRounding:
    """How channels are rounded, checked once, for kernels that round on the way.

    Attributes:
        channels: C, whose last group may be smaller than `group_size`.
        scale, zero, levels, group_size, bits: as `round_channels` takes them; on the CPU,
            contiguous.

    Raises:
        ShapeError, DTypeError, InputError: they do not fit together.
    """

    channels: int
    scale: Tensor
    zero: Tensor
    levels: Tensor | None
    group_size: int
    bits: int

    def __post_init__(self) -> None:
        if self.channels < 0:
            raise InputError(f"channels must be at least 0, not {self.channels}")
        tensors = self.scale, self.zero, self.levels
        group_size = check_rounding(
            self.channels, torch.device("cpu"), *tensors, self.group_size, self.bits
        )
        object.__setattr__(self, "group_size", group_size)
        for name, x in zip(("scale", "zero", "levels"), tensors, strict=True):
            if x is not None:
                check_plain(name, x)

    def is_of(self, scale: Tensor, zero: Tensor, levels: Tensor | None) -> bool:
        """Whether it rounds with these very tensors, whatever numbers they hold by now."""
        return self.scale is scale and self.zero is zero and self.levels is levels
