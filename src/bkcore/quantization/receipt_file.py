"""The file of a receipt in a checkpoint's folder: written, and read with everything checked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bkcore import manifest
from bkcore.errors import CheckpointError
from bkcore.outputs import to_json
from bkcore.quantization.config import QuantizationConfig
from bkcore.reading import parse_json, shown


def read(folder: Path) -> dict[str, Any]:
    """The receipt in a checkpoint's folder.

    Raises:
        CheckpointError: if the checkpoint is missing or incomplete, or has no receipt because it is
            a float model or was saved by a version that wrote none.
    """
    receipt = find(folder, manifest.verify(folder))
    if receipt is None or "weights" not in receipt:
        raise CheckpointError(
            f"the checkpoint {folder} has no receipt; it is not quantized, or was saved by a "
            "version that wrote none; bkcore quantize makes a quantized one from a float model"
        )
    return receipt


def find(folder: Path, digests: manifest.Digests) -> dict[str, Any] | None:
    """The receipt of a checkpoint with these digests, or None if it has none.

    Raises:
        CheckpointError: if the file was not written by `write`.
    """
    if manifest.RECEIPT not in digests:
        return None
    content = manifest.contents(folder, manifest.RECEIPT, digests)
    try:
        receipt = parse_json(content)
        _check(receipt)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{folder / manifest.RECEIPT} is not a receipt: {error}") from error
    return dict(receipt)


def write(receipt: dict[str, Any], folder: Path) -> None:
    """Write a receipt into a folder; numbers that JSON cannot hold are null, with the reason."""
    (folder / manifest.RECEIPT).write_text(to_json(receipt, indent=1), encoding="utf-8")


_NONE = (type(None),)
_INT, _TEXT, _NUMBER = (int,), (str,), (int, float, *_NONE)  # null for what JSON cannot hold

_FIELDS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("name", "part", "kernel", "scheme", "levels", "rounding", "dtype"), _TEXT),
    **dict.fromkeys(("range_method", "reason"), _TEXT + _NONE),
    **dict.fromkeys(("bits", "bytes", "scales", "channels", "group_size"), _INT),
    **dict.fromkeys(("layer", "tokens", "steps"), _INT),
    "calibration_tokens": _INT + _NONE,
    **dict.fromkeys(("smallest_scale", "largest_scale", "error", "bound", "worst"), _NUMBER),
    **dict.fromkeys(("relative_error", "first_loss", "last_loss"), _NUMBER),
    "clipping_rate": _NUMBER,
    "shape": (list,),
    "clipped": (dict,),
    "distilled": (bool,),
}
"""The types of the fields of all entries."""

_NEEDED = {
    "weights": "name part shape kernel bytes bits scheme calibration_tokens",
    "activations": (
        "name bits scheme scales smallest_scale largest_scale range_method calibration_tokens"
    ),
    "float": "name shape bytes reason",
    "cores": "layer tokens error bound worst clipped",
    "training": "steps distilled first_loss last_loss",
}
"""The fields that each section's entries must have."""


def _check(receipt: object) -> None:
    """Raise `ValueError` or `TypeError` unless this is a receipt as `of_quantized` returns."""
    if not isinstance(receipt, dict):
        raise TypeError(f"it is {shown(receipt)}")
    if "weights" in receipt:
        if "quantization" not in receipt or not receipt["weights"]:
            raise ValueError("it does not name the mode, or lists no weight")
        receipt = {"activations": [], "float": [], **receipt}
    for section, content in receipt.items():
        if section == "quantization":
            if not isinstance(content, dict):
                raise TypeError(f"its quantization is {shown(content)}")
            QuantizationConfig.from_dict(content)
        elif section == "calibration":
            _check_counts(content)
        elif section in _NEEDED:
            entries = [content] if section == "training" else content
            if not isinstance(entries, list):
                raise TypeError(f"{section} is {shown(entries)}, not a list")
            for entry in entries:
                _check_entry(section, entry)


def _check_entry(section: str, entry: object) -> None:
    if not isinstance(entry, dict):
        raise TypeError(f"an entry of {section} is {shown(entry)}")
    missing = sorted(set(_NEEDED[section].split()) - entry.keys())
    if missing:
        raise ValueError(f"an entry of {section} lacks {missing}")
    for name, value in entry.items():
        kinds = _FIELDS.get(name, (object,))
        if not isinstance(value, kinds) or (isinstance(value, bool) and kinds == _INT):
            raise TypeError(f"{name} in {section} is {shown(value)}")
    sizes = entry.get("shape", [])
    if not all(type(size) is int and size > 0 for size in sizes):
        raise ValueError(f"a shape in {section} is {shown(sizes)}")
    if section == "weights" and len(sizes) != 2:
        raise ValueError(f"the shape of a weight is {shown(sizes)}")
    _check_counts(entry.get("clipped", {}))


def _check_counts(counts: object) -> None:
    if not isinstance(counts, dict) or not all(type(count) is int for count in counts.values()):
        raise TypeError(f"{shown(counts)} is not a mapping from names to counts")
