"""What `bkcore quantize` prints by default: the receipt in a few lines, and what to type next."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import rich.console
from rich.table import Table

from bkcore.commands.receipt import size, training
from bkcore.display.console import number, say, warn
from bkcore.quantization.budget import average_bits

_PARTS = {"core": "core", "expert": "experts", "head": "embedding and head"}


def heading(receipt: dict[str, Any]) -> str:
    """The mode, and the bits that it came to."""
    mode = receipt["quantization"]["mode"]
    return f"{mode}: {average_bits(receipt):.3f} bits a weight on average"


def parts(receipt: dict[str, Any]) -> Table:
    """The weights of each part of the model by the way they are stored, and what enters the core.

    Args:
        receipt: see `bkcore.model.receipt.of_quantized`.
    """
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for entry in receipt["weights"]:
        key = _PARTS[entry["part"]], _stored(entry, receipt["quantization"])
        groups.setdefault(key, []).append(entry)
    for entry in receipt["activations"]:
        key = "activations of the core", f"INT{entry['bits']}"
        groups.setdefault(key, []).append(entry)
    table = Table(box=None, padding=(0, 2, 0, 0))
    for name in ("part", "stored as"):
        table.add_column(name)
    for name in ("tensors", "numbers", "MB"):
        table.add_column(name, justify="right")
    for (part, stored), entries in groups.items():
        numbers = sum(math.prod(entry["shape"]) for entry in entries if "shape" in entry)
        megabytes = sum(entry["bytes"] for entry in entries) / 1e6
        cells = [f"{numbers:,}" if numbers else "", f"{megabytes:.2f}" if numbers else ""]
        table.add_row(part, stored, str(len(entries)), *cells)
    return table


def kept_in_float(receipt: dict[str, Any]) -> str:
    """A line on the tensors that no mode quantizes, and why."""
    entries = receipt["float"]
    given = (entry["reason"] for entry in entries if entry["reason"])  # `surprises` names the rest
    reasons = dict.fromkeys(reason.partition(":")[0] for reason in given)
    megabytes = sum(entry["bytes"] for entry in entries) / 1e6
    return (
        f"Float in every mode: {len(entries)} tensors, {megabytes:.2f} MB; each has few numbers or "
        f"decides much ({', '.join(reasons)})"
    )


def show(
    console: rich.console.Console,
    result: dict[str, Any],
    checkpoint: Path,
    output: Path,
    control: Path | None,
    data: str | None,
) -> None:
    """Print the summary.

    Args:
        console: where to.
        result: of `run_quantize`.
        checkpoint, output, control, data: its arguments.
    """
    say(console, heading(result["receipt"]))
    console.print(parts(result["receipt"]))
    for line in _facts(result, output):
        say(console, line)
    say(console, f"Checkpoint: {output}")
    if control is not None:
        say(console, f"Control: {control}")
    for line in _warnings(result):
        warn(console, line)
    for line in _next_steps(checkpoint, output, data):
        say(console, line)


def _stored(entry: dict[str, Any], config: dict[str, Any]) -> str:
    """How a weight is stored."""
    if "reason" in entry:
        return f"float16, under {config['min_size']:,} numbers"
    if entry["bits"] > 8:
        return str(entry["scheme"]) if entry["bits"] == 16 else "float32"
    scales = f"groups of {config['group_size']}" if entry["bits"] == 4 else "a scale for each row"
    return f"INT{entry['bits']}, {scales}"


def _facts(result: dict[str, Any], output: Path) -> Iterator[str]:
    """Lines on what stays float, the calibration, the training, the perplexity and the size."""
    receipt = result["receipt"]
    yield kept_in_float(receipt)
    yield f"Calibrated on {result['calibration_tokens']:,} tokens of {result['corpus']}"
    trained = training(receipt)
    if trained is not None:
        yield trained
    for point in result.get("points", [])[:1]:  # the first is the saved model
        low, high = (number(point[f"ci_{end}_pct"], "+.2f") for end in ("low", "high"))
        change = number(point["delta_pct"], "+.2f")
        yield f"Perplexity on held-out training text: {change} % ({low} to {high})"
    yield size(receipt, output)


def _warnings(result: dict[str, Any]) -> Iterator[str]:
    from bkcore.model.receipt import surprises

    found = surprises(result["receipt"])
    if found:
        others = f", and {len(found) - 1:,} more like this" if len(found) > 1 else ""
        yield f"warning: {found[0]}{others}; --strict refuses such a model"
    if result["warning"] is not None:
        yield result["warning"]


def _next_steps(checkpoint: Path, output: Path, data: str | None) -> Iterator[str]:
    """Commands that somebody who has quantized a model may want next."""
    model, original = shlex.quote(str(output)), shlex.quote(str(checkpoint))
    text = "FOLDER" if data is None else shlex.quote(data)
    yield f"Try it:      bkcore generate {model}"
    yield f"Its cost:    bkcore evaluate {model} --reference {original} --data {text}"
    yield f"Each tensor: bkcore receipt {model}"
