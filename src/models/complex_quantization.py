"""The complex quantizer under its first import path."""

from bkcore.quantization import ComplexQuantizer as ComplexQuantizer
