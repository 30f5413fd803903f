"""Exceptions that bkcore raises. Each also derives from the built-in type a caller would expect."""


class BKCoreError(Exception):
    """Base class of every error that bkcore raises on purpose."""


class InputError(BKCoreError, ValueError):
    """An argument has an impossible value; the message names it and says what is allowed."""


class ShapeError(InputError):
    """A tensor's shape does not fit the other arguments or the module that received it."""


class DTypeError(BKCoreError, TypeError):
    """A tensor's dtype does not fit, such as a complex tensor where a real one is needed."""


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


class CheckpointError(BKCoreError, RuntimeError):
    """A checkpoint is missing, truncated, altered, or in a format this version cannot read."""


class OutputError(BKCoreError, OSError):
    """A result could not be written: the disk is full, say, or a pipe was closed."""


class DataError(BKCoreError, ValueError):
    """A text corpus is missing, unreadable, empty or too small."""


class BenchmarkError(BKCoreError, ArithmeticError):
    """A benchmark found a wrong result and did not time it, or the process that it timed died."""
