"""INT8 and INT4 quantization of complex-valued cores and of linear layers."""

from typing import TYPE_CHECKING

from bkcore.lazy import lazy_names

if TYPE_CHECKING:
    from bkcore.quantization.complex_quantizer import ComplexQuantizer
    from bkcore.quantization.config import QuantizationConfig
    from bkcore.quantization.core import (
        QuantizedBirmanSchwingerCore,
        create_quantized_birman_schwinger,
    )
    from bkcore.quantization.lifecycle import QuantizationState
    from bkcore.quantization.packing import pack_int4, unpack_int4
    from bkcore.quantization.quantizers import GroupWiseQuantizer
else:
    __getattr__ = lazy_names(
        __name__,
        {
            "complex_quantizer": "ComplexQuantizer",
            "config": "QuantizationConfig",
            "core": "QuantizedBirmanSchwingerCore create_quantized_birman_schwinger",
            "lifecycle": "QuantizationState",
            "packing": "pack_int4 unpack_int4",
            "quantizers": "GroupWiseQuantizer",
        },
    )

__all__ = [
    "ComplexQuantizer",
    "GroupWiseQuantizer",
    "QuantizationConfig",
    "QuantizationState",
    "QuantizedBirmanSchwingerCore",
    "create_quantized_birman_schwinger",
    "pack_int4",
    "unpack_int4",
]


def __dir__() -> list[str]:
    return __all__
