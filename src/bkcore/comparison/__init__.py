"""Trainings side by side: mixers and other models, and the modes of quantization."""
