"""The C++ extension, if it is there and was built for this Python code."""

from bkcore_runtime.errors import EngineError

INTERFACE = 1
"""Version of the extension's interface. Every change of its functions' arguments or results raises
it, here and in csrc/engine/module.cpp, so that an extension built for other Python code is
recognized."""

_REMEDY = (
    "reinstall bkcore-runtime with a C++17 compiler on the path: pip install --force-reinstall "
    "--no-deps bkcore-runtime (in a checkout, ./runtime in place of bkcore-runtime)"
)

try:
    from bkcore_runtime import _engine
except ImportError as error:
    raise EngineError(
        f"the native extension bkcore_runtime._engine did not load ({error}); {_REMEDY}"
    ) from error

_found = getattr(_engine, "__interface__", None)
if _found != INTERFACE:
    raise EngineError(
        f"the native extension bkcore_runtime._engine has interface {_found}, but this Python code "
        f"needs {INTERFACE}; {_REMEDY}"
    )

__all__ = ["INTERFACE", "_engine"]
