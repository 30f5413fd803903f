"""The quantized core under its first import path."""

from bkcore.quantization import (  # noqa: F401
    GroupWiseQuantizer,
    QuantizationConfig,
    QuantizedBirmanSchwingerCore,
    create_quantized_birman_schwinger,
)
