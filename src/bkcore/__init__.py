"""bkcore: a quantized Birman-Schwinger core.

The public names. Each is imported when first used, so that importing the package itself is quick:
PyTorch takes a second, transformers longer.
"""

import importlib
from typing import TYPE_CHECKING, Any

from bkcore.deprecated import moved_names

if TYPE_CHECKING:
    from bkcore.core import (
        BirmanSchwingerCore,
        causal_sweep,
        resolvent_attention,
        resolvent_diagonal,
    )
    from bkcore.errors import BKCoreError
    from bkcore.model import LanguageModel, ResNetBKConfig, ResNetBKForCausalLM
    from bkcore.quantization import (
        ComplexQuantizer,
        GroupWiseQuantizer,
        QuantizationConfig,
        QuantizationState,
        QuantizedBirmanSchwingerCore,
        create_quantized_birman_schwinger,
    )

__version__ = "0.1.0"

__all__ = [
    "BKCoreError",
    "BirmanSchwingerCore",
    "ComplexQuantizer",
    "GroupWiseQuantizer",
    "LanguageModel",
    "QuantizationConfig",
    "QuantizationState",
    "QuantizedBirmanSchwingerCore",
    "ResNetBKConfig",
    "ResNetBKForCausalLM",
    "causal_sweep",
    "create_quantized_birman_schwinger",
    "resolvent_attention",
    "resolvent_diagonal",
]

_PLACES = ("bkcore.core", "bkcore.quantization", "bkcore.model")
_PACKAGES = ("core", "errors", "evaluation", "kernels", "model", "quantization", "text", "training")

_moved = moved_names(__name__)


def __dir__() -> list[str]:
    return [*__all__, *_PACKAGES]


def __getattr__(name: str) -> Any:
    if name in _PACKAGES:
        return importlib.import_module(f"bkcore.{name}")
    if name == "BKCoreError":
        return importlib.import_module("bkcore.errors").BKCoreError
    for place in _PLACES if name in __all__ else ():
        module = importlib.import_module(place)
        if name in module.__all__:
            return getattr(module, name)
    return _moved(name)
