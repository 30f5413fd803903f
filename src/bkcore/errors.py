"""Exceptions that bkcore raises. Each also derives from the built-in type a caller would expect."""

from bkcore_runtime import errors as _runtime

# What the runtime raises as well are its classes.
BKCoreError = _runtime.BKCoreError
InputError = _runtime.InputError
ShapeError = _runtime.ShapeError
DTypeError = _runtime.DTypeError
CheckpointError = _runtime.CheckpointError
UnsupportedError = _runtime.UnsupportedError
EngineError = _runtime.EngineError


class BackendError(BKCoreError, RuntimeError):
    """The requested kernel backend is not available or cannot take these tensors."""


class LifecycleError(BKCoreError, RuntimeError):
    """A quantization step was called out of order; the message names the missing step."""


class CalibrationError(BKCoreError, ValueError):
    """Calibration saw no data, or data that gives no usable range."""


class DivergenceError(BKCoreError, ArithmeticError):
    """Training diverged: the loss or the weights are NaN or infinite."""


class ReceiptError(BKCoreError, RuntimeError):
    """A quantized model differs from what its mode promises in at least one tensor."""


class OutputError(BKCoreError, OSError):
    """A result could not be written: the disk is full, say, or a pipe was closed."""


class DataError(BKCoreError, ValueError):
    """A text corpus is missing, unreadable, empty or too small."""


class BenchmarkError(BKCoreError, ArithmeticError):
    """A benchmark found a wrong result and did not time it, or the process that it timed died."""
