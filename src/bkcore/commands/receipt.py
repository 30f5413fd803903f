"""`bkcore receipt`: what quantization did to every tensor of a model, as tables."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import rich.console
import typer
from rich import box
from rich.table import Table

from bkcore.commands.files import Files
from bkcore.commands.options import JsonOption
from bkcore.display.console import Console, number, say
from bkcore.manifest import model_bytes
from bkcore.quantization import receipt_file
from bkcore.quantization.budget import average_bits


def receipt(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint folder of a quantized model.")],
    json_file: JsonOption = None,
) -> None:
    """Print what quantization did to every tensor of a checkpoint."""
    files = Files(json_file)
    files.prepare(checkpoints=[checkpoint])
    content = receipt_file.read(checkpoint)
    files.publish(partial(show, Console(), content, checkpoint), content)


def show(console: rich.console.Console, receipt: dict[str, Any], folder: Path) -> None:
    """Print a receipt, and the size of the checkpoint in `folder`."""
    for each in tables(receipt):
        console.print(each, "")
    trained = training(receipt)
    for line in (*([] if trained is None else [trained]), size(receipt, folder)):
        say(console, line)


def tables(receipt: dict[str, Any]) -> list[Table]:
    """Tables of the weights, the core's activations, its errors, and the tensors that stay float.

    Args:
        receipt: see `bkcore.model.receipt.of_quantized`.
    """
    cores = [_cores(receipt)] if receipt.get("cores") else []
    return [_weights(receipt), _activations(receipt), *cores, _float(receipt)]


def size(receipt: dict[str, Any], folder: Path) -> str:
    """A line on the size of a checkpoint's files, compared with all its parameters in float32."""
    entries = (*receipt["weights"], *receipt["float"])
    in_float32 = 4 * sum(math.prod(entry["shape"]) for entry in entries)
    on_disk = model_bytes(folder)
    return (
        f"Size: {on_disk / 1e6:.2f} MB, {on_disk / in_float32:.1%} of the {in_float32 / 1e6:.2f} "
        f"MB of float32"
    )


def training(receipt: dict[str, Any]) -> str | None:
    """A line on the training in a QAT mode; None if the receipt records none."""
    entry = receipt.get("training")
    if entry is None:
        return None
    towards = (
        "what the float model predicts, divergence" if entry["distilled"] else "the text, loss"
    )
    return (
        f"Trained {entry['steps']:,} steps towards {towards} {entry['first_loss']:.4f} -> "
        f"{entry['last_loss']:.4f} nats a token"
    )


def _weights(receipt: dict[str, Any]) -> Table:
    config = receipt["quantization"]
    table = _table(f"weights, {config['mode']}: {average_bits(receipt):.3f} bits on average")
    notes = []
    if any(entry.get("rounding") == "gptq" for entry in receipt["weights"]):
        notes.append("* rounded by GPTQ, which makes up for the errors of other weights")
    if any("reason" in entry for entry in receipt["weights"]):
        notes.append(f"small: in float16, fewer than {config['min_size']:,} numbers")
    table.caption = "\n".join(notes) or None
    table.add_column("weight", no_wrap=True)
    table.add_column("bits")
    table.add_column("group", justify="right")
    table.add_column("range")
    for heading in ("clipped\n%", "error\n%", "tokens\nseen"):
        table.add_column(heading, justify="right")
    table.add_column("bytes", justify="right", no_wrap=True, min_width=7)
    table.add_column("kernel", no_wrap=True, min_width=7)
    for entry in receipt["weights"]:
        table.add_row(
            _short(entry["name"]),
            str(entry["bits"]),
            str(entry.get("group_size", "")),
            _range(entry),
            _percent(entry.get("clipping_rate")),
            _percent(entry.get("relative_error")),
            _count(entry["calibration_tokens"]),
            f"{entry['bytes']:,}",
            entry["kernel"].replace("aten::", "").replace("bkcore::", ""),
        )
    return table


def _activations(receipt: dict[str, Any]) -> Table:
    table = _table("what enters and leaves the core")
    table.add_column("quantizer", no_wrap=True)
    for heading in ("bits", "scheme", "range"):
        table.add_column(heading)
    for heading in ("scales", "smallest", "largest", "clipped\n%", "tokens\nseen"):
        table.add_column(heading, justify="right")
    for entry in receipt["activations"]:
        table.add_row(
            _short(entry["name"]),
            str(entry["bits"]),
            entry["scheme"].replace("metric", "."),
            str(entry["range_method"]),
            str(entry["scales"]),
            number(entry["smallest_scale"], ".2e"),
            number(entry["largest_scale"], ".2e"),
            _percent(entry.get("clipping_rate")),
            _count(entry["calibration_tokens"]),
        )
    return table


def _cores(receipt: dict[str, Any]) -> Table:
    table = _table("errors of the core and what bounds them")
    for heading in (
        "layer",
        "tokens",
        "error",
        "certified bound",
        "worst ratio",
        "clipped",
    ):
        table.add_column(heading, justify="right")
    for entry in receipt["cores"]:
        table.add_row(
            str(entry["layer"]),
            f"{entry['tokens']:,}",
            number(entry["error"], ".2e"),
            number(entry["bound"], ".2e"),
            number(entry["worst"], ".3f"),
            f"{sum(entry['clipped'].values()):,}",
        )
    return table


def _float(receipt: dict[str, Any]) -> Table:
    table = _table("float in every mode")
    table.add_column("tensor", no_wrap=True)
    table.add_column("shape")
    table.add_column("bytes", justify="right")
    table.add_column("reason")
    for entry in receipt["float"]:
        shape = " x ".join(map(str, entry["shape"]))
        table.add_row(
            _short(entry["name"]), shape, f"{entry['bytes']:,}", entry["reason"] or "none"
        )
    return table


def _table(title: str) -> Table:
    return Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)


def _short(name: str) -> str:
    """A shorter name, to leave room for other columns: 0.experts.3.up is in expert 3 of layer 0."""
    name = name.removeprefix("layers.").replace(".experts.experts.", ".experts.")
    return name.replace(".mixer.quantizers.", ".")


def _range(entry: dict[str, Any]) -> str:
    method = str(entry.get("range_method", entry["scheme"]))
    if "reason" in entry:
        return "small"
    return f"{method} *" if entry.get("rounding") == "gptq" else method


def _percent(rate: float | None) -> str:
    return "" if rate is None else number(100 * rate, ".3g")


def _count(tokens: int | None) -> str:
    return "unknown" if tokens is None else f"{tokens:,}"
