"""Arguments of the engine's functions: checked, and copied where others could change them."""

from __future__ import annotations

import functools
import importlib
from array import array
from collections.abc import Iterable
from numbers import Integral, Real
from types import ModuleType
from typing import TYPE_CHECKING, Any

from bkcore_runtime.errors import DTypeError, InputError, ShapeError
from bkcore_runtime.reading import shortened, shown

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Integers = npt.NDArray[np.int64]


@functools.cache
def numpy_for(name: str) -> ModuleType:
    """The module numpy; raises `InputError` if it is not installed."""
    try:
        return importlib.import_module("numpy")
    except ModuleNotFoundError as error:
        raise InputError(f"{name} needs numpy; pip install 'bkcore-runtime[numpy]'") from error


def only_row(row: array[int]) -> memoryview:
    """A row of integers as the only one of a batch: (1, N)."""
    return memoryview(row).cast("B").cast("q", (1, len(row)))


def row_of_integers(values: npt.ArrayLike, name: str) -> array[int]:
    """A copy of at least one integer as int64; a list of them needs no numpy.

    Raises:
        ShapeError: if the values are not (N,), N >= 1.
        DTypeError: if the values are not integers.
    """
    if isinstance(values, list | tuple | range) and {type(each) for each in values} <= {int}:
        try:
            row = array("q", values)
        except OverflowError as error:
            raise DTypeError(f"{name} must be integers that fit int64") from error
    else:
        found = integers(values, name)
        if found.ndim != 1:
            raise ShapeError(f"{name} must be (N,), N >= 1, not {found.shape}")
        row = array("q", found.tolist())
    if not row:
        raise ShapeError(f"{name} must be (N,), N >= 1, not (0,)")
    return row


def integers(values: npt.ArrayLike, name: str) -> Integers:
    """A copy as int64, which nobody else can change while it is read.

    Raises:
        ShapeError: if rows have different lengths.
        DTypeError: if the values are not integers.
    """
    if _holds_bools(values):
        raise DTypeError(f"{name} must be integers that fit int64, not bool")
    np = numpy_for(f"{name} that is not a list of integers")
    found = array_of(values, name)
    # numpy takes an empty list for one of floats
    if found.size and (found.dtype.kind not in "iu" or not np.can_cast(found.dtype, np.int64)):
        raise DTypeError(f"{name} must be integers that fit int64, not {found.dtype}")
    return np.array(found, dtype=np.int64, order="C")


def array_of(values: object, name: str) -> npt.NDArray[Any]:
    """Values as numpy takes them.

    Raises:
        ShapeError: if rows have different lengths.
        DTypeError: if they are, say, a tensor that needs gradients or is not on the CPU.
    """
    try:
        return numpy_for(name).asarray(values)
    except ValueError as error:
        raise ShapeError(f"{name} must have rows of one length") from error
    except (TypeError, RuntimeError) as error:
        raise DTypeError(f"{name} cannot be read as an array: {shortened(error)}") from error


def _holds_bools(values: object) -> bool:
    """Whether there are truth values, which numpy takes for integers if others are."""
    if isinstance(values, list | tuple):
        kinds = set(map(type, values))
        if all(issubclass(each, Integral) and not issubclass(each, bool) for each in kinds):
            return False  # long lists are such
        return any(map(_holds_bools, values))
    return isinstance(values, bool) or "bool" in str(getattr(values, "dtype", ""))


def list_of_integers(values: Iterable[Any], name: str) -> list[int]:
    """A copy as plain integers, without numpy.

    Raises:
        DTypeError: if a value is no integer.
    """
    found: list[Any] = values.tolist() if hasattr(values, "tolist") else list(values)
    if {type(each) for each in found} <= {int}:
        return found
    for each in found:
        if isinstance(each, bool) or not isinstance(each, Integral):
            raise DTypeError(f"{name} must be integers, not {shown(each)}")
    return list(map(int, found))


def an_integer(name: str, value: object) -> int:
    """An integer; raises `InputError` if the value is none."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise InputError(f"{name} must be an integer, not {shown(value)}")
    return int(value)


def a_number(name: str, value: object) -> float:
    """A number; raises `InputError` if the value is none, or float64 cannot hold it."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise InputError(f"{name} must be a number, not {shown(value)}")
    try:
        return float(value)
    except OverflowError as error:
        raise InputError(f"{name} must be a number of float64, not {shown(value)}") from error
