"""bkcore_runtime: language models of bkcore on CPUs, without PyTorch.

`load` reads a checkpoint folder and returns an `Engine`, which turns token ids into logits or into
more token ids, and a `Tokenizer`. Names are imported when first used, so that a program which only
needs the exceptions does not wait for numpy.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bkcore_runtime.engine import Engine, LayerState, State
    from bkcore_runtime.errors import (
        BKCoreError,
        CheckpointError,
        DTypeError,
        EngineError,
        InputError,
        ShapeError,
        UnsupportedError,
    )
    from bkcore_runtime.loading import load
    from bkcore_runtime.tokenizer import Tokenizer

__version__ = "0.1.0"

__all__ = [
    "BKCoreError",
    "CheckpointError",
    "DTypeError",
    "Engine",
    "EngineError",
    "InputError",
    "LayerState",
    "ShapeError",
    "State",
    "Tokenizer",
    "UnsupportedError",
    "load",
]

_PLACES = {
    **dict.fromkeys(("Engine", "LayerState", "State"), "engine"),
    **{"Tokenizer": "tokenizer", "load": "loading"},
}


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str) -> Any:
    if name in __all__:
        module = importlib.import_module(f"{__name__}.{_PLACES.get(name, 'errors')}")
        return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
