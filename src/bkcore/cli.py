"""The command `bkcore`. Heavy imports wait until a command needs them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from bkcore.errors import BenchmarkError, BKCoreError
from bkcore.memory import keep_freed_memory

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

DataOption = Annotated[
    str | None,
    typer.Option(
        metavar="FOLDER|NAME",
        help="Folder of text, or a Hugging Face data set as OWNER/NAME:CONFIG; "
        "default: an embedded corpus.",
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
        raise typer.BadParameter(f"{text!r} is no percentage, such as 1%") from error


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"bkcore {version('bkcore')}")
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


@app.command()
def demo(
    data: DataOption = None,
    json_file: JsonOption = None,
    output: Annotated[Path, typer.Option(help="Folder for the checkpoints.")] = Path("runs/demo"),
) -> None:
    """Train a language model, quantize it in five modes, and judge what was saved."""
    from bkcore.report import files
    from bkcore.report.demo import run_demo, table

    console = Console()
    if json_file is not None:
        files.prepare_file(json_file)
    result = run_demo(data, output, console)
    console.print(table(result))
    if json_file is not None:
        files.write_json(result, json_file)
    console.print(f"Checkpoints: {output}", highlight=False)


@app.command()
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
    from bkcore.report import files
    from bkcore.report.curve import draw_curve
    from bkcore.report.recipe import read_recipe
    from bkcore.report.train import run_training

    if plot is not None:
        files.prepare_plot(plot)
    folder = output or Path("runs") / config.stem
    report = run_training(read_recipe(config), data, folder, resume, Console())
    if plot is not None:
        draw_curve(report, plot)


@app.command()
def export(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint folder of a float model.")],
    output: Annotated[Path, typer.Argument(help="Folder to write.")],
) -> None:
    """Save a float checkpoint in float16, at half the size; bkcore's commands widen it again."""
    from bkcore.report.export import export_half

    export_half(checkpoint, output)
    typer.echo(f"Checkpoint: {output}")


@app.command()
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
    data: DataOption = None,
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
    from bkcore.report import budget, files
    from bkcore.report.quantize import QuantizeSettings, as_json, run_quantize
    from bkcore.report.receipt import size, tables, training

    console = Console()
    if json_file is not None:
        files.prepare_file(json_file)
    if frontier is not None:
        files.prepare_plot(frontier)
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
    result = run_quantize(checkpoint, output, data, settings, console, control)
    for table in tables(result["receipt"]):
        console.print(table, "")
    if has_budget:
        console.print(budget.sensitivity_table(result["sensitivity"], result["assignment"]))
        console.print(budget.frontier_table(result["points"]))
    if frontier is not None:
        budget.draw_frontier(result["points"], frontier)
    if json_file is not None:
        files.write_json(as_json(result), json_file)
    calibrated = f"{result['calibration_tokens']:,} tokens of {result['corpus']}"
    console.print(f"Calibrated on {calibrated}", highlight=False, soft_wrap=True)
    if (line := training(result["receipt"])) is not None:
        console.print(line, highlight=False, soft_wrap=True)
    console.print(size(result["receipt"], output), highlight=False, soft_wrap=True)
    console.print(f"Checkpoint: {output}", highlight=False, soft_wrap=True)
    if control is not None:
        console.print(f"Control: {control}", highlight=False, soft_wrap=True)


@app.command()
def receipt(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint folder of a quantized model.")],
    json_file: JsonOption = None,
) -> None:
    """Print what was done to every tensor of a quantized checkpoint."""
    from bkcore.report import files
    from bkcore.report.receipt import read_receipt, size, tables, training

    console = Console()
    content = read_receipt(checkpoint)
    for table in tables(content):
        console.print(table, "")
    if (line := training(content)) is not None:
        console.print(line, highlight=False, soft_wrap=True)
    console.print(size(content, checkpoint), highlight=False, soft_wrap=True)
    if json_file is not None:
        files.prepare_file(json_file)
        files.write_json(content, json_file)


@app.command()
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
    from bkcore.report import files
    from bkcore.report.evaluate import load_table, run_evaluation, summary

    console = Console()
    if json_file is not None:
        files.prepare_file(json_file)
    result = run_evaluation(checkpoint, data, reference, console, window, output)
    console.print(summary(result))
    if result["expert_load"]:
        console.print(load_table(result["expert_load"]))
    if json_file is not None:
        files.write_json(result, json_file)


@app.command()
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
    from bkcore.report import files

    console = Console()
    if json_file is not None:
        files.prepare_file(json_file)
    if threads is not None:
        torch.set_num_threads(threads)
    comparison = Comparison(
        LanguageSettings(training_tokens=tokens), SyntheticSettings(steps=steps)
    )
    result = run_comparison(comparison, data, output, console, only, seed)
    if result["language"]:
        console.print(language_table(result))
    if result["synthetic"]:
        console.print(synthetic_table(result))
    if result["unfinished"]:
        console.print("unfinished: " + ", ".join(result["unfinished"]), highlight=False)
    if json_file is not None:
        files.write_json(result, json_file)


@app.command()
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

    typer.echo(continue_text(checkpoint, prompt, tokens, temperature, seed))


def _prepare_rows(json_file: Path | None, markdown: Path | None) -> None:
    from bkcore.report import files

    for path in (json_file, markdown):
        if path is not None:
            files.prepare_file(path)


def _publish_rows(
    console: Console, results: Sequence[Result], json_file: Path | None, markdown: Path | None
) -> None:
    from bkcore.bench.result import markdown_table, report, table
    from bkcore.report import files

    console.print(table(results))
    if json_file is not None:
        files.write_json(report(results), json_file)
    if markdown is not None:
        markdown.write_text(markdown_table(results))


@bench.command("kernels")
def bench_kernels(
    json_file: JsonOption = None,
    markdown: MarkdownOption = None,
    plot: PlotOption = None,
    only: OnlyOption = "",
) -> None:
    """Time the kernels against copies, limits and other ways to the same result."""
    from bkcore.bench.kernels import run_kernels
    from bkcore.bench.plot import draw
    from bkcore.report import files

    console = Console()
    _prepare_rows(json_file, markdown)
    if plot is not None:
        files.prepare_plot(plot)
    results = run_kernels(console, only)
    _publish_rows(console, results, json_file, markdown)
    if plot is not None:
        draw(results, plot)


@bench.command("gpu")
def bench_gpu(json_file: JsonOption = None, markdown: MarkdownOption = None) -> None:
    """Time the Triton kernels against a copy in the memory of this GPU."""
    from bkcore.bench.gpu import run_gpu

    console = Console()
    _prepare_rows(json_file, markdown)
    _publish_rows(console, run_gpu(console), json_file, markdown)


@bench.command("inference")
def bench_inference(
    json_file: JsonOption = None, markdown: MarkdownOption = None, only: OnlyOption = ""
) -> None:
    """Time quantized models against float32, and against GPT-2 and Mamba of transformers."""
    from bkcore.bench.inference import run_inference

    console = Console()
    _prepare_rows(json_file, markdown)
    _publish_rows(console, run_inference(console, only), json_file, markdown)


@bench.command("memory")
def bench_memory(
    json_file: JsonOption = None,
    markdown: MarkdownOption = None,
    plot: PlotOption = None,
    longest: Annotated[int, typer.Option(help="Most tokens of a sequence.")] = 65_536,
) -> None:
    """Measure the peak memory and the time of long sequences, in training and evaluation."""
    from bkcore.bench.memory import markdown_table, report, run_memory, table
    from bkcore.bench.plot import draw_memory
    from bkcore.report import files

    console = Console()
    for path in (json_file, markdown):
        if path is not None:
            files.prepare_file(path)
    if plot is not None:
        files.prepare_plot(plot)
    points = run_memory(console, longest)
    console.print(table(points))
    if json_file is not None:
        files.write_json(report(points), json_file)
    if markdown is not None:
        markdown.write_text(markdown_table(points))
    if plot is not None:
        draw_memory(points, plot)


@bench.command("stream")
def bench_stream(
    json_file: JsonOption = None,
    length: Annotated[int, typer.Option(help="Tokens to read before the timed ones.")] = 1_000_000,
) -> None:
    """Time single tokens early and late in a text."""
    from bkcore.bench.stream import report, run_stream, summary
    from bkcore.report import files

    console = Console()
    if json_file is not None:
        files.prepare_file(json_file)
    result = run_stream(console, length)
    console.print(summary(result), highlight=False)
    if json_file is not None:
        files.write_json(report(result), json_file)


@bench.command("stability")
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
    from bkcore.report import files

    console = Console()
    if json_file is not None:
        files.prepare_file(json_file)
    result = run_stability(console, checkpoint, reference, data, length, step)
    console.print(table(result.ages))
    if json_file is not None:
        files.write_json(report(result), json_file)


def main() -> None:
    """Run the command; an error that bkcore foresaw is one sentence, not a traceback.

    The exit code is 1 where a benchmark found a wrong result, and 2 for all other such errors.
    """
    keep_freed_memory()
    try:
        app()
    except BKCoreError as error:
        Console(stderr=True).print(f"[bold red]bkcore:[/] {error}", highlight=False)
        sys.exit(1 if isinstance(error, BenchmarkError) else 2)
