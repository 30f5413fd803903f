"""Limits of the benchmarks' options, importable without PyTorch."""

from __future__ import annotations

FIRST_AGE = 1_000
"""Tokens after which `bkcore bench stability` first compares the models."""

MOST_A_CALL = 4_096
"""Tokens that `bkcore bench stability` reads in one call at most."""
