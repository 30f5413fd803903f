"""Lines of the summary that `bkcore quantize` prints."""

from __future__ import annotations

from bkcore.commands.quantize_summary import kept_in_float


def test_each_reason_to_stay_float_is_given_once() -> None:
    reasons = ["norm: a number for each channel", "router: small", "norm: another", None]
    line = kept_in_float({"float": [{"bytes": 250_000, "reason": each} for each in reasons]})
    assert line.startswith("Float in every mode: 4 tensors, 1.00 MB; ")
    assert line.endswith(" (norm, router)")
