"""Comparisons of trainings: mixers and other models, and the quantization modes."""
