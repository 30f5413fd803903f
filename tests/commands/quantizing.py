"""What the tests of `bkcore quantize` share: a text, and how they quantize."""

from __future__ import annotations

from rich.console import Console

from bkcore.commands.quantize_settings import QuantizeSettings
from bkcore.commands.quantize_steps import UNIFORM_MODES

LINES = [
    f"the {('slow', 'quick', 'lonely')[i * i % 3]} fox sees site {i * 7 % 11} again .\n"
    for i in range(1500)
]
TRAIN, VALID = "".join(LINES[100:]), "".join(LINES[:100])
QUIET = Console(quiet=True)


def settings(**options: object) -> QuantizeSettings:
    if not str(options.get("mode", "ptq_int8")).endswith("int8"):
        options = {"group_size": 8, **options}
    if str(options.get("mode", "ptq_int8")) in UNIFORM_MODES and not (
        {"target_bits", "max_increase"} & set(options)
    ):
        options = {"min_size": 0, **options}  # all weights are small here
    return QuantizeSettings(calibration_tokens=512, **options)  # type: ignore[arg-type]
