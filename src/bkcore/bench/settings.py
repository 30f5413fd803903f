"""Cases of the benchmarks and limits of their options, importable without PyTorch."""

from __future__ import annotations

FIRST_AGE = 1_000
"""Tokens after which `bkcore bench stability` first compares the models."""

MOST_A_CALL = 4_096
"""Tokens that `bkcore bench stability` reads in one call at most."""

SHORTEST = 1_024
"""Tokens of the shortest sequence of `bkcore bench memory`."""

YOUNG = 1_000
"""Tokens after which `bkcore bench stream` first times single ones."""

KERNEL_SECONDS = {
    "large": 30.0,
    "fresh memory": 20.0,
    "cache": 3.0,
    "backward": 60.0,
    "one lane": 10.0,
    "layout": 30.0,
    "growth": 60.0,
    "one token": 2.0,
    "codes": 60.0,
    "comparison": 120.0,
}
"""The cases of `bkcore bench kernels`, and about how long each takes."""

WIDTHS = (32, 64, 128, 256, 512, 1024)
"""The widths of the models that `bkcore bench inference` times."""


def inference_cases(widths: tuple[int, ...] = WIDTHS) -> list[str]:
    """The names of the cases of `bkcore bench inference`, in order."""
    return ["layers", *(f"width {width}" for width in widths), "loops", "serving", "rivals"]
