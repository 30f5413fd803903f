"""The command `bkcore`. Heavy imports wait until a command needs them."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bkcore.host import keep_freed_memory
from bkcore.outputs import write_json, write_text
from bkcore.report.command import Command, keeping, publish, run
from bkcore.report.console import Console, say, warn

if TYPE_CHECKING:
    from bkcore.bench.result import Result


app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="A quantized Birman-Schwinger core: small, linear-time language models in 8 or 4 bits.",
)

bench = typer.Typer(no_args_is_help=True, help="Measure speed and memory on this machine.")
app.add_typer(bench, name="bench")
command = partial(app.command, cls=Command)
bench_command = partial(bench.command, cls=Command)

DataOption = Annotated[
    str | None,
    typer.Option(
        metavar="FOLDER|NAME",
        help="Folder of text, or a Hugging Face data set as OWNER/NAME:CONFIG; "
        "default: the embedded corpus.",
    ),
]
CalibrationOption = Annotated[
    str | None,
    typer.Option(
        metavar="FOLDER|NAME",
        help="Text to calibrate on, as in bkcore train; default: the samples of its training text "
        "that the checkpoint holds.",
    ),
]
JsonOption = Annotated[Path | None, typer.Option("--json", help="Write the result here, too.")]
MarkdownOption = Annotated[Path | None, typer.Option(help="Write a Markdown table here, too.")]
PlotOption = Annotated[Path | None, typer.Option(help="Draw a picture: .png or .svg.")]
OnlyOption = Annotated[
    str, typer.Option(help="Only cases whose names begin so; a wrong name lists them.")
]


def _percent(text: str) -> float:
    """The number in "1%" or "1".

    Raises:
        typer.BadParameter: if there is none.
    """
    try:
        return float(text.removesuffix("%"))
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} is not a percentage, such as 1%") from error


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"bkcore {version('bkcore')}")
        raise typer.Exit


@app.callback()
def _options(
    show_version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    """Options of every command."""


@command()
def demo(
    data: DataOption = None,
    json_file: JsonOption = None,
    output: Annotated[Path, typer.Option(help="Folder for the checkpoints.")] = Path("runs/demo"),
) -> None:
    """Train a language model, quantize it in five modes, and judge what was saved."""
    from bkcore.report.demo import run_demo, table
    from bkcore.report.files import prepare

    console = Console()
    prepare({"--json": json_file}, {"--output": output}, [data])
    result = run_demo(data, output, console)

    def show() -> None:
        console.print(table(result))
        say(console, f"Checkpoints: {output}")

    publish(show, (json_file, partial(write_json, result)))


@command()
def train(
    config: Annotated[Path, typer.Option(help="Recipe in YAML, such as configs/wikitext2.yaml.")],
    data: DataOption = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder for all results; default: runs/NAME OF THE RECIPE.")
    ] = None,
    resume: Annotated[
        bool, typer.Option(help="Continue what is there, or delete its checkpoints.")
    ] = True,
    plot: PlotOption = None,
) -> None:
    """Train a language model by a recipe; a killed training resumes by the same command."""
    from bkcore.report.curve import draw_curve
    from bkcore.report.files import prepare, prepare_plot
    from bkcore.report.recipe import read_recipe
    from bkcore.report.train import run_training

    folder = output or Path("runs") / config.stem
    if plot is not None:
        prepare_plot(plot)
    prepare({"--plot": plot}, {"--output": folder}, [config, data])
    with keeping(f"{folder} keeps the checkpoints, and the same command continues from the last"):
        report = run_training(read_recipe(config), data, folder, resume, Console())
    if plot is not None:
        draw_curve(report, plot)


@command()
def export(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint folder of a float model.")],
    output: Annotated[Path, typer.Argument(help="Folder to write.")],
) -> None:
    """Save a float checkpoint in float16, at half the size; bkcore's commands widen it again."""
    from bkcore.report.export import export_half

    export_half(checkpoint, output)
    say(Console(), f"Checkpoint: {output}")


@command()
def quantize(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint folder of a float model.")],
    output: Annotated[Path, typer.Argument(help="Folder to write.")],
    mode: Annotated[
        str | None,
        typer.Option(
            help="ptq_int8, ptq_int4, mixed_precision, qat_int8 or qat_int4. "
            "Default: ptq_int8, or mixed_precision with a bit budget."
        ),
    ] = None,
    data: CalibrationOption = None,
    group_size: Annotated[
        int | None,
        typer.Option(min=1, help="Inputs of an INT4 weight that share a scale; default: 128."),
    ] = None,
    min_size: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Weights with fewer numbers stay in float16, because their products are slower "
            "in codes; default: 2,048, and 0 leaves none.",
        ),
    ] = None,
    calibration_tokens: Annotated[
        int,
        typer.Option(min=1, help="Tokens of the training text to calibrate on, in whole windows."),
    ] = 32_768,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Training steps of the QAT modes.")
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="Peak rate of the QAT modes; default: 1e-4.")
    ] = None,
    distill: Annotated[
        bool | None,
        typer.Option(
            "--distill/--no-distill",
            help="Train a QAT mode towards what the float model predicts, or towards the text. "
            "Default: the model.",
        ),
    ] = None,
    control: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Train the float model on the text for the same steps, too, and save it here: "
            "what a QAT model is to be compared with.",
        ),
    ] = None,
    target_bits: Annotated[
        float | None,
        typer.Option(help="Most bits of a weight on average, scales included: 4, 8 or 16 each."),
    ] = None,
    max_ppl_increase: Annotated[
        str | None,
        typer.Option(
            metavar="PERCENT",
            help="The smallest model whose perplexity on held-out training text rises by no more.",
        ),
    ] = None,
    frontier: Annotated[
        Path | None,
        typer.Option(help="Measure models of all sizes, and draw them: .png or .svg."),
    ] = None,
    strict: Annotated[
        bool, typer.Option(help="Write nothing if a tensor is not as its mode promises.")
    ] = False,
    json_file: JsonOption = None,
) -> None:
    """Quantize a checkpoint, and print the receipt that is saved with it."""
    from bkcore.report import budget
    from bkcore.report.files import prepare, prepare_plot
    from bkcore.report.quantize import QuantizeSettings, as_json, run_quantize
    from bkcore.report.receipt import show

    console = Console()
    has_budget = target_bits is not None or max_ppl_increase is not None
    settings = QuantizeSettings(
        mode=mode or ("mixed_precision" if has_budget else "ptq_int8"),
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
    if frontier is not None:
        prepare_plot(frontier)
    prepare(
        {"--json": json_file, "--frontier": frontier},
        {"OUTPUT": output, "--control": control},
        [checkpoint, data],
    )
    result = run_quantize(checkpoint, output, data, settings, console, control)

    def show_all() -> None:
        tables = []
        if has_budget:
            tables += [budget.sensitivity_table(result["sensitivity"], result["assignment"])]
            tables += [budget.frontier_table(result["points"])]
        calibrated = f"{result['calibration_tokens']:,} tokens of {result['corpus']}"
        show(console, result["receipt"], output, tables, [f"Calibrated on {calibrated}"])
        say(console, f"Checkpoint: {output}")
        if control is not None:
            say(console, f"Control: {control}")
        if result["warning"] is not None:
            warn(console, result["warning"])

    publish(
        show_all,
        (json_file, partial(write_json, as_json(result))),
        (frontier, partial(budget.draw_frontier, result.get("points", []))),
    )


@command()
def receipt(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint folder of a quantized model.")],
    json_file: JsonOption = None,
) -> None:
    """Print what was done to every tensor of a quantized checkpoint."""
    from bkcore.report.files import prepare
    from bkcore.report.receipt import read_receipt, show

    prepare({"--json": json_file}, read=[checkpoint])
    content = read_receipt(checkpoint)
    publish(
        partial(show, Console(), content, checkpoint), (json_file, partial(write_json, content))
    )


@command()
def evaluate(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint folder.")],
    data: DataOption = None,
    reference: Annotated[
        Path | None, typer.Option(help="Checkpoint to compare perplexity and speed with.")
    ] = None,
    window: Annotated[
        int | None, typer.Option(min=1, help="Tokens a window; default: as in its training.")
    ] = None,
    output: Annotated[
        Path, typer.Option(help="Folder that keeps what an interrupted evaluation scored.")
    ] = Path("runs/evaluate"),
    json_file: JsonOption = None,
) -> None:
    """Measure the perplexity of a checkpoint on the validation split.

    If it is interrupted, the same command continues where it was.
    """
    from bkcore.report.evaluate import load_table, run_evaluation, summary
    from bkcore.report.files import prepare

    console = Console()
    prepare({"--json": json_file}, {"--output": output}, [checkpoint, reference, data])

    def finish(result: dict[str, Any]) -> None:
        def show() -> None:
            console.print(summary(result))
            if result["expert_load"]:
                console.print(load_table(result["expert_load"]))
            if result["warning"] is not None:
                warn(console, result["warning"])

        publish(show, (json_file, partial(write_json, result)))

    with keeping(f"{output} keeps what was scored, and the same command continues from there"):
        run_evaluation(checkpoint, data, reference, console, window, output, finish)


@command()
def compare(
    data: DataOption = None,
    json_file: JsonOption = None,
    output: Annotated[
        Path, typer.Option(help="Folder of the runs; finished ones are not done again.")
    ] = Path("runs/compare"),
    only: Annotated[
        str, typer.Option(help="Only runs whose names begin so, such as language/mamba.")
    ] = "",
    seed: Annotated[
        int | None, typer.Option(min=0, help="This seed instead of the planned ones.")
    ] = None,
    tokens: Annotated[
        int, typer.Option(min=1, help="Training tokens of each language model.")
    ] = 6_000_000,
    steps: Annotated[
        int, typer.Option(min=1, help="Training steps of each run of a synthetic task.")
    ] = 1500,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads; default: as PyTorch chooses.")
    ] = None,
) -> None:
    """Train ResNet-BK, its ablations, GPT-2, Llama and Mamba alike, and compare them.

    Each run can be interrupted and continued; several processes may share the work.
    """
    import torch

    from bkcore.comparison.compare import Comparison, run_comparison
    from bkcore.comparison.language import LanguageSettings
    from bkcore.comparison.synthetic import SyntheticSettings
    from bkcore.comparison.tables import language_table, synthetic_table
    from bkcore.report.files import prepare

    console = Console()
    prepare({"--json": json_file}, {"--output": output}, [data])
    if threads is not None:
        torch.set_num_threads(threads)
    comparison = Comparison(
        LanguageSettings(training_tokens=tokens), SyntheticSettings(steps=steps)
    )
    with keeping(f"{output} keeps what was trained, and the same command continues from there"):
        result = run_comparison(comparison, data, output, console, only, seed)

    def show() -> None:
        if result["language"]:
            console.print(language_table(result))
        if result["synthetic"]:
            console.print(synthetic_table(result))
        if result["unfinished"]:
            say(console, "unfinished: " + ", ".join(result["unfinished"]))

    publish(show, (json_file, partial(write_json, result)))


@command()
def generate(
    checkpoint: Annotated[
        Path, typer.Argument(help="Checkpoint folder; default: the one in the repository.")
    ] = Path("checkpoints/wikitext2"),
    prompt: Annotated[str, typer.Option(help="Text to continue.")] = "The ",
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to add.")] = 60,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest.")] = 0.8,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
) -> None:
    """Continue a text with a checkpoint."""
    from bkcore.report.generate import continue_text

    print(continue_text(checkpoint, _as_text(prompt), tokens, temperature, seed))


def _as_text(argument: str) -> str:
    """An argument in UTF-8 as text, where the locale took it for something else."""
    try:
        return os.fsencode(argument).decode()
    except UnicodeError:
        return argument


def _prepare_rows(
    json_file: Path | None, markdown: Path | None = None, plot: Path | None = None
) -> None:
    from bkcore.report.files import prepare, prepare_plot

    if plot is not None:
        prepare_plot(plot)
    prepare({"--json": json_file, "--markdown": markdown, "--plot": plot})


def _publish_rows(
    console: Console,
    results: Sequence[Result],
    json_file: Path | None,
    markdown: Path | None,
    plot: Path | None = None,
) -> None:
    from bkcore.bench.plot import draw
    from bkcore.bench.result import markdown_table, report, table

    publish(
        lambda: console.print(table(results)),
        (json_file, partial(write_json, report(results))),
        (markdown, partial(write_text, markdown_table(results))),
        (plot, partial(draw, results)),
    )


@bench_command("kernels")
def bench_kernels(
    json_file: JsonOption = None,
    markdown: MarkdownOption = None,
    plot: PlotOption = None,
    only: OnlyOption = "",
) -> None:
    """Time the kernels against copies, limits and other ways to the same result."""
    from bkcore.bench.kernels import run_kernels

    console = Console()
    _prepare_rows(json_file, markdown, plot)
    _publish_rows(console, run_kernels(console, only), json_file, markdown, plot)


@bench_command("gpu")
def bench_gpu(json_file: JsonOption = None, markdown: MarkdownOption = None) -> None:
    """Time the Triton kernels against a copy in the memory of this GPU."""
    from bkcore.bench.gpu import run_gpu

    console = Console()
    _prepare_rows(json_file, markdown)
    _publish_rows(console, run_gpu(console), json_file, markdown)


@bench_command("inference")
def bench_inference(
    json_file: JsonOption = None, markdown: MarkdownOption = None, only: OnlyOption = ""
) -> None:
    """Time quantized models against float32, and against GPT-2 and Mamba of transformers."""
    from bkcore.bench.inference import run_inference

    console = Console()
    _prepare_rows(json_file, markdown)
    _publish_rows(console, run_inference(console, only), json_file, markdown)


@bench_command("memory")
def bench_memory(
    json_file: JsonOption = None,
    markdown: MarkdownOption = None,
    plot: PlotOption = None,
    longest: Annotated[int, typer.Option(help="Most tokens of a sequence.")] = 65_536,
) -> None:
    """Measure the peak memory and the time of long sequences, in training and evaluation."""
    from bkcore.bench.memory import markdown_table, report, run_memory, table
    from bkcore.bench.plot import draw_memory

    console = Console()
    _prepare_rows(json_file, markdown, plot)
    points = run_memory(console, longest)
    publish(
        lambda: console.print(table(points)),
        (json_file, partial(write_json, report(points))),
        (markdown, partial(write_text, markdown_table(points))),
        (plot, partial(draw_memory, points)),
    )


@bench_command("stream")
def bench_stream(
    json_file: JsonOption = None,
    length: Annotated[int, typer.Option(help="Tokens to read before the timed ones.")] = 1_000_000,
) -> None:
    """Time single tokens early and late in a text."""
    from bkcore.bench.stream import report, run_stream, summary

    console = Console()
    _prepare_rows(json_file)
    result = run_stream(console, length)
    publish(
        lambda: console.print(summary(result)), (json_file, partial(write_json, report(result)))
    )


@bench_command("stability")
def bench_stability(
    checkpoint: Annotated[Path, typer.Argument(help="Folder of a quantized model.")],
    reference: Annotated[
        Path, typer.Option(help="Folder of the float model that it was made of.")
    ] = Path("checkpoints/wikitext2"),
    data: DataOption = None,
    json_file: JsonOption = None,
    length: Annotated[int, typer.Option(min=1_000, help="Tokens to read.")] = 1_000_000,
    step: Annotated[
        int,
        typer.Option(
            min=1, max=4_096, help="Tokens a call, at most 4,096; 1 reads as decoding does."
        ),
    ] = 4_096,
) -> None:
    """Read a text over and over: does a quantized model stay as near to float as it was?"""
    from bkcore.bench.stability import report, run_stability, table
    from bkcore.report.files import prepare

    console = Console()
    prepare({"--json": json_file}, read=[checkpoint, reference, data])
    result = run_stability(console, checkpoint, reference, data, length, step)
    publish(
        lambda: console.print(table(result.ages)),
        (json_file, partial(write_json, report(result))),
    )


def main() -> None:
    """Run the command; an error that bkcore foresaw is one sentence, not a traceback.

    The exit code is 1 where a benchmark found a wrong result, 130 or 143 after an interruption, 141
    where what was printed went into a pipe that was closed, and 2 for all other such errors.
    """
    keep_freed_memory()
    sys.exit(run(app))
