"""Benchmarks of bkcore against what a user might run instead."""

from bkcore.deprecated import moved_names

__getattr__ = moved_names(__name__)
