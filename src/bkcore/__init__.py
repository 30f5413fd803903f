"""bkcore: a quantized Birman-Schwinger core.

The public names. Each is imported when first used, so that importing the package itself is quick:
PyTorch takes a second, transformers longer.
"""

from typing import TYPE_CHECKING

from bkcore.lazy import lazy_names

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

_PACKAGES = ("core", "errors", "evaluation", "kernels", "model", "quantization", "text", "training")

__getattr__ = lazy_names(
    __name__,
    {
        "core": "BirmanSchwingerCore causal_sweep resolvent_attention resolvent_diagonal",
        "errors": "BKCoreError",
        "model": "LanguageModel ResNetBKConfig ResNetBKForCausalLM",
        "quantization": "ComplexQuantizer GroupWiseQuantizer QuantizationConfig QuantizationState "
        "QuantizedBirmanSchwingerCore create_quantized_birman_schwinger",
    },
)


def __dir__() -> list[str]:
    return [*__all__, *_PACKAGES]
