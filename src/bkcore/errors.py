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
    """A kernel backend was asked for that is absent or cannot take these tensors."""


class LifecycleError(BKCoreError, RuntimeError):
    """A quantization step came out of order; the message names the step that is missing."""


class CalibrationError(BKCoreError, ValueError):
    """Calibration saw no data, or data from which no range can be taken."""


class DivergenceError(BKCoreError, ArithmeticError):
    """A training ran away: its loss or its weights are no finite numbers any more."""


class ReceiptError(BKCoreError, RuntimeError):
    """A quantized model is not, tensor for tensor, what its mode promises."""


class CheckpointError(BKCoreError, RuntimeError):
    """A checkpoint is missing, truncated, altered, or of a format this version cannot read."""


class OutputError(BKCoreError, OSError):
    """A result could not be written: no space is left, or a pipe was closed."""


class DataError(BKCoreError, ValueError):
    """A text corpus is missing, unreadable, empty or too small."""


class BenchmarkError(BKCoreError, ArithmeticError):
    """A benchmark found a wrong result, and did not time it."""
