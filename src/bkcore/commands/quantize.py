"""`bkcore quantize`: quantize a checkpoint in a mode, or within a bit budget."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bkcore.commands.bit_budget_tables import draw_frontier, frontier_table, sensitivity_table
from bkcore.commands.files import Files
from bkcore.commands.options import JsonOption
from bkcore.commands.quantize_settings import QuantizeSettings, check_folders
from bkcore.commands.quantize_summary import show
from bkcore.commands.receipt import tables
from bkcore.commands.running import start_work, use_free_cores
from bkcore.display.console import Console
from bkcore.quantization.config import MODES, QAT_LEARNING_RATE, QuantizationConfig

if TYPE_CHECKING:
    from bkcore.evaluation.sensitivity import Sensitivity
    from bkcore.quantization.budget import Assignment


def quantize(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint folder of a float model.")],
    output: Annotated[Path, typer.Argument(help="Folder to write.")],
    mode: Annotated[
        str | None,
        typer.Option(
            help=f"{', '.join(MODES[:-1])} or {MODES[-1]}. "
            f"Default: {QuantizeSettings.mode}, or {QuantizationConfig.MIXED_PRECISION} with a "
            "bit budget."
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER|NAME",
            help="Text to calibrate on, as in bkcore train; default: the samples of the training "
            "text in the checkpoint.",
        ),
    ] = None,
    group_size: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Inputs of an INT4 weight that share a scale; default: "
            f"{QuantizationConfig.group_size}.",
        ),
    ] = None,
    min_size: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Weights with fewer numbers stay in float16, because integer products of that "
            f"size are slower; default: {QuantizationConfig.min_size:,}; with 0 none stay.",
        ),
    ] = None,
    calibration_tokens: Annotated[
        int,
        typer.Option(min=1, help="Tokens of the training text to calibrate on, in whole windows."),
    ] = QuantizeSettings.calibration_tokens,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Training steps of the QAT modes.")
    ] = None,
    learning_rate: Annotated[
        float | None,
        typer.Option(help=f"Peak learning rate of the QAT modes; default: {QAT_LEARNING_RATE:g}."),
    ] = None,
    distill: Annotated[
        bool | None,
        typer.Option(
            "--distill/--no-distill",
            help="Train a QAT mode on the predictions of the float model, or on the text. "
            "Default: on the predictions.",
        ),
    ] = None,
    control: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Also train the float model on the text for the same steps and save it here, "
            "for comparison with a QAT model.",
        ),
    ] = None,
    target_bits: Annotated[
        float | None,
        typer.Option(
            help="Most bits per weight on average, including scales; each gets 4, 8 or 16."
        ),
    ] = None,
    max_ppl_increase: Annotated[
        str | None,
        typer.Option(
            metavar="PERCENT",
            help="Make the smallest model whose perplexity on held-out training text rises by no "
            "more than this.",
        ),
    ] = None,
    frontier: Annotated[
        Path | None,
        typer.Option(help="Also measure models of all sizes, and draw them: .png or .svg."),
    ] = None,
    strict: Annotated[
        bool, typer.Option(help="Write nothing if a tensor differs from what its mode promises.")
    ] = False,
    json_file: JsonOption = None,
    verbose: Annotated[
        bool,
        typer.Option("--verbose", help="Print every tensor, and what the bit budget measured."),
    ] = False,
) -> None:
    """Quantize a checkpoint and save it with a receipt, and say what was done."""
    console = Console()
    has_budget = target_bits is not None or max_ppl_increase is not None
    settings = QuantizeSettings(
        mode=mode or (QuantizationConfig.MIXED_PRECISION if has_budget else QuantizeSettings.mode),
        group_size=group_size,
        min_size=min_size,
        calibration_tokens=calibration_tokens,
        steps=steps,
        learning_rate=learning_rate,
        distill=distill,
        strict=strict,
        target_bits=target_bits,
        max_increase=None if max_ppl_increase is None else _percent(max_ppl_increase),
        frontier=frontier is not None,
    )
    files = Files(json_file, plot=frontier, plot_option="--frontier")
    files.prepare({"OUTPUT": output, "--control": control}, [checkpoint], data)
    check_folders(checkpoint, output, control, settings)
    start_work()
    from bkcore.commands.quantize_steps import run_quantize

    use_free_cores()
    result = run_quantize(checkpoint, output, data, settings, console, control)

    def show_all() -> None:
        if verbose:
            for table in tables(result["receipt"]):
                console.print(table, "")
            if has_budget:
                console.print(sensitivity_table(result["sensitivity"], result["assignment"]))
                console.print(frontier_table(result["points"]))
        show(console, result, checkpoint, output, control, data)

    draw = partial(draw_frontier, result.get("points", []))
    files.publish(show_all, _as_json(result), draw=draw)


def _percent(text: str) -> float:
    """The number in "1%" or "1".

    Raises:
        typer.BadParameter: if the text is neither.
    """
    try:
        return float(text.removesuffix("%"))
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} is not a percentage, such as 1%") from error


def _as_json(result: dict[str, Any]) -> dict[str, Any]:
    """The result of `run_quantize`, ready for JSON."""
    sensitivity: list[Sensitivity] = result.get("sensitivity", [])
    assignment: Assignment = result.get("assignment", {})
    if not sensitivity:
        return result
    return result | {
        "sensitivity": [vars(entry) for entry in sensitivity],
        "assignment": {unit: vars(choice) for unit, choice in assignment.items()},
    }
