"""bkcore: a quantized Birman-Schwinger core.

The public names. The language model needs transformers, which takes seconds to import, so its
names are looked up when they are first used.
"""

from typing import TYPE_CHECKING, Any

from bkcore.core import BirmanSchwingerCore, causal_sweep, resolvent_attention, resolvent_diagonal
from bkcore.errors import BKCoreError
from bkcore.quantization import (
    ComplexQuantizer,
    GroupWiseQuantizer,
    QuantizationConfig,
    QuantizationState,
    QuantizedBirmanSchwingerCore,
    create_quantized_birman_schwinger,
)

if TYPE_CHECKING:
    from bkcore.model import LanguageModel, ResNetBKConfig, ResNetBKForCausalLM

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


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str) -> Any:
    if name in ("LanguageModel", "ResNetBKConfig", "ResNetBKForCausalLM"):
        import bkcore.model

        return getattr(bkcore.model, name)
    raise AttributeError(f"module 'bkcore' has no attribute {name!r}")
