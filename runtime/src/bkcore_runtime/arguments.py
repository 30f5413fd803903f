"""Arguments of the engine's functions: checked, and copied where others could change them."""

from __future__ import annotations

import functools
import importlib
from array import array
from numbers import Integral, Real
from types import ModuleType
from typing import TYPE_CHECKING

from bkcore_runtime.errors import DTypeError, InputError, ShapeError
from bkcore_runtime.reading import shown

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
    """A copy of at least one integer as int64.

    Raises:
        ShapeError: if the values are not (N,), N >= 1.
        DTypeError: if the values are not integers.
    """
    if isinstance(values, list | tuple | range) and {type(each) for each in values} == {int}:
        try:
            return array("q", values)
        except OverflowError as error:
            raise DTypeError(f"{name} must be integers that fit int64") from error
    found = integers(values, name)
    if found.ndim != 1 or not found.size:
        raise ShapeError(f"{name} must be (N,), N >= 1, not {found.shape}")
    return array("q", found.tolist())


def integers(values: npt.ArrayLike, name: str) -> Integers:
    """A copy as int64, which nobody else can change while it is read.

    Raises:
        DTypeError: if the values are not integers.
    """
    np = numpy_for(f"{name} that is not a list of integers")
    try:
        found = np.asarray(values)
    except ValueError as error:  # rows of different lengths
        raise ShapeError(f"{name} must have rows of one length") from error
    if found.dtype.kind not in "iu" or not np.can_cast(found.dtype, np.int64):
        raise DTypeError(f"{name} must be integers that fit int64, not {found.dtype}")
    return np.array(found, dtype=np.int64, order="C")


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
