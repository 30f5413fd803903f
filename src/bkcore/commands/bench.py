"""`bkcore bench`: speed and memory on this machine, one command per topic."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bkcore.arguments import starting_with
from bkcore.bench.settings import (
    FIRST_AGE,
    KERNEL_SECONDS,
    MOST_A_CALL,
    SHORTEST,
    YOUNG,
    inference_cases,
)
from bkcore.commands.files import Files
from bkcore.commands.options import SHIPPED, DataOption, JsonOption, PlotOption
from bkcore.commands.running import Command, start_work
from bkcore.display.console import Console, say

if TYPE_CHECKING:
    from bkcore.bench.result import Result

app = typer.Typer(no_args_is_help=True, help="Measure speed and memory on this machine.")
command = partial(app.command, cls=Command)

MarkdownOption = Annotated[Path | None, typer.Option(help="Also write a Markdown table here.")]
OnlyOption = Annotated[
    str, typer.Option(help="Only cases whose names start with this; a wrong name lists them.")
]


def _publish(files: Files, console: Console, results: Sequence[Result]) -> None:
    from bkcore.bench.plot import draw
    from bkcore.bench.result import markdown_table, report, table

    files.publish(
        lambda: console.print(table(results)),
        report(results),
        markdown_table(results),
        partial(draw, results),
    )


@command()
def kernels(
    json_file: JsonOption = None,
    markdown: MarkdownOption = None,
    plot: PlotOption = None,
    only: OnlyOption = "",
) -> None:
    """Time the kernels against copies, limits and other ways to compute the same result."""
    console, files = Console(), Files(json_file, markdown, plot)
    files.prepare()
    starting_with(only, KERNEL_SECONDS, "case")  # before the imports
    from bkcore.bench.kernels import run_kernels

    _publish(files, console, run_kernels(console, only))


@command()
def gpu(json_file: JsonOption = None, markdown: MarkdownOption = None) -> None:
    """Time the Triton kernels against a copy in this GPU's memory."""
    console, files = Console(), Files(json_file, markdown)
    files.prepare()
    start_work()
    from bkcore.bench.gpu import run_gpu

    _publish(files, console, run_gpu(console))


@command()
def inference(
    json_file: JsonOption = None, markdown: MarkdownOption = None, only: OnlyOption = ""
) -> None:
    """Time quantized models against float32, and against GPT-2 and Mamba of transformers."""
    console, files = Console(), Files(json_file, markdown)
    files.prepare()
    starting_with(only, inference_cases(), "case")  # before the imports
    start_work()
    from bkcore.bench.inference import run_inference

    _publish(files, console, run_inference(console, only))


@command()
def engines(
    json_file: JsonOption = None,
    plot: PlotOption = None,
    only: OnlyOption = "",
    rivals: Annotated[
        bool, typer.Option("--rivals/--no-rivals", help="Whether to time llama.cpp, too.")
    ] = True,
) -> None:
    """Time decoding and reading against llama.cpp, on models with as many parameters."""
    from bkcore.bench.engine_rows import table
    from bkcore.bench.engines import run_engines
    from bkcore.bench.plot import draw_engines

    console, files = Console(), Files(json_file, plot=plot)
    files.prepare(read=[SHIPPED])
    found = run_engines(console, SHIPPED, only, rivals)
    files.publish(
        lambda: console.print(table(found.rows)),
        found.as_dict(),
        draw=partial(draw_engines, found.rows),
    )


@command()
def memory(
    json_file: JsonOption = None,
    markdown: MarkdownOption = None,
    plot: PlotOption = None,
    longest: Annotated[
        int, typer.Option(min=SHORTEST, help="Longest sequence, in tokens.")
    ] = 65_536,
) -> None:
    """Measure peak memory and time of long sequences, in training and evaluation."""
    console, files = Console(), Files(json_file, markdown, plot)
    files.prepare()
    start_work()
    from bkcore.bench.memory import markdown_table, report, run_memory, table
    from bkcore.bench.plot import draw_memory

    points = run_memory(console, longest)
    files.publish(
        lambda: console.print(table(points)),
        report(points),
        markdown_table(points),
        partial(draw_memory, points),
    )


@command()
def stream(
    json_file: JsonOption = None,
    length: Annotated[
        int, typer.Option(min=8 * YOUNG, help="Tokens to read before the timed ones.")
    ] = 1_000_000,
) -> None:
    """Time single tokens early and late in a text."""
    console, files = Console(), Files(json_file)
    files.prepare()
    start_work()
    from bkcore.bench.stream import report, run_stream, summary

    result = run_stream(console, length)
    files.publish(lambda: say(console, summary(result)), report(result))


@command()
def stability(
    checkpoint: Annotated[Path, typer.Argument(help="Folder of a quantized model.")],
    reference: Annotated[
        Path, typer.Option(help="Folder of the float model it was made from.")
    ] = SHIPPED,
    data: DataOption = None,
    json_file: JsonOption = None,
    length: Annotated[int, typer.Option(min=FIRST_AGE, help="Tokens to read.")] = 1_000_000,
    step: Annotated[
        int,
        typer.Option(
            min=1,
            max=MOST_A_CALL,
            help=f"Tokens per call, at most {MOST_A_CALL:,}; 1 reads as decoding does.",
        ),
    ] = MOST_A_CALL,
) -> None:
    """Read a text over and over: does a quantized model stay as close to the float one?"""
    console, files = Console(), Files(json_file)
    files.prepare(checkpoints=[checkpoint, reference], data=data)
    start_work()
    from bkcore.bench.stability import report, run_stability, table

    result = run_stability(console, checkpoint, reference, data, length, step)
    files.publish(lambda: console.print(table(result.ages)), report(result))
