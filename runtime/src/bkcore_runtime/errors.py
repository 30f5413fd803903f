"""Exceptions. Each also derives from the built-in type a caller would expect.

`bkcore.errors` hands these on, and has more of them.
"""


class BKCoreError(Exception):
    """Base class of every error that bkcore and its runtime raise on purpose."""


class InputError(BKCoreError, ValueError):
    """An argument has an impossible value; the message names it and says what is allowed."""


class ShapeError(InputError):
    """The shape of an array or tensor does not fit the other arguments, or what received it."""


class DTypeError(BKCoreError, TypeError):
    """A dtype does not fit, such as that of a complex tensor where a real one is needed."""


class CheckpointError(BKCoreError, RuntimeError):
    """A checkpoint is missing, truncated, altered, or in a format this version cannot read."""


class UnsupportedError(CheckpointError):
    """A checkpoint is beyond the engine of `bkcore_runtime`, but not beyond bkcore with PyTorch."""


class EngineError(BKCoreError, RuntimeError):
    """The engine of `bkcore_runtime` cannot compute; the system starts no more threads, say."""
