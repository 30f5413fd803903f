"""`bkcore demo`: a language model in every mode of quantization."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.table import Table

from bkcore.commands.files import Files, say_what_is_replaced
from bkcore.commands.options import SHIPPED, DataOption, JsonOption
from bkcore.commands.running import start_work, use_free_cores
from bkcore.display.console import Console, bits_per_byte, number, say
from bkcore.errors import BKCoreError, InputError
from bkcore.text import load_corpus

PROMPT = " The river rises in"

_CALIBRATION_WINDOWS = 8
"""A first look; `bkcore quantize` takes all that the checkpoint keeps."""


def demo(
    data: DataOption = None,
    json_file: JsonOption = None,
    output: Annotated[Path, typer.Option(help="Folder for the checkpoints.")] = Path("runs/demo"),
) -> None:
    """Train a language model, quantize it in five modes, and evaluate what was saved."""
    console, files = Console(), Files(json_file)
    files.prepare({"--output": output}, data=data)
    corpus = load_corpus(data)
    start_work()
    from bkcore.comparison.demo import folders, run_demo

    use_free_cores()
    say_what_is_replaced(console, folders(output))
    show_shipped(console)
    result = run_demo(corpus, output, console)

    def show() -> None:
        console.print(table(result))
        say(console, f"Checkpoints: {output}")

    files.publish(show, result)


def show_shipped(console: Console, checkpoint: Path = SHIPPED) -> None:
    """Let the shipped model continue a sentence, in float and in INT4, before anything is trained.

    If it cannot, print why; the demo goes on.
    """
    try:
        _show(console, checkpoint)
    except BKCoreError as error:
        say(console, f"the shipped model cannot be shown first: {error}")


def _show(console: Console, checkpoint: Path) -> None:
    from bkcore.evaluation.checkpoints import load_float
    from bkcore.evaluation.samples import load_samples

    model, tokenizer = load_float(checkpoint)
    _continue("float32", model, tokenizer, console)
    samples = load_samples(checkpoint, model.config.vocab_size)
    if samples is None:
        raise InputError(f"{checkpoint} holds no samples of its training text to calibrate on")
    model.configure_quantization("ptq_int4")
    model.calibrate_quantization(samples[:_CALIBRATION_WINDOWS].split(4))
    _continue("INT4", model, tokenizer, console)


def _continue(name: str, model: Any, tokenizer: Any, console: Console) -> None:
    from bkcore.commands.generate import sample

    size = sum(x.nbytes for x in model.state_dict().values())
    text = " ".join(sample(model, tokenizer, PROMPT, 30).split())
    say(console, f"{name}, {size / 1e6:.1f} MB: {text}")


def table(report: dict[str, Any]) -> Table:
    """A demo's report as a table for a terminal of 80 columns.

    Two modes whose changes of perplexity differ by less than their intervals are told apart by the
    KL divergence of their next-token distributions from float32's, in thousandths of a nat.
    """
    protocol, control = report["protocol"], report["control"]
    result = Table(
        title=f"{protocol['corpus']}, {protocol['split']}: {protocol['tokens']:,} tokens scored",
        caption=f"QAT imitates float32; {control['mode']} trained on the text for as many steps",
        box=box.SIMPLE_HEAD,
        padding=0,
        show_edge=False,
    )
    result.add_column("mode")
    for heading in ("ppl\ntoken", "bits\nbyte", "change\n%", "95 %\ninterval", "KL\nmnats"):
        result.add_column(heading, justify="right", no_wrap=True)
    for heading in ("size\nMB", "size\nratio", "tokens\nper s", "speed\nratio"):
        result.add_column(heading, justify="right", no_wrap=True)
    for entry in [*report["rows"], control]:
        is_float = entry["mode"] == "float32"
        low, high = (number(entry[f"ci_{end}_pct"], "+.2f") for end in ("low", "high"))
        result.add_row(
            entry["mode"],
            number(entry["ppl_token"], ".2f"),
            bits_per_byte(entry["ppl_byte"], ".2f"),
            "" if is_float else number(entry["delta_pct"], "+.2f"),
            "" if is_float else f"{low} to {high}",
            "" if is_float else _millinats(entry["kl_nats"]),
            f"{entry['bytes'] / 1e6:.2f}",
            f"{entry['size_ratio']:.2f}",
            _speed(entry["tokens_per_second"]),
            f"{entry['speedup']:.2f}",
        )
    return result


def _millinats(nats: float) -> str:
    """At most five characters, so that the table fits."""
    return number(1000 * nats, ".2f" if nats < 0.1 else ".0f")


def _speed(tokens_per_second: float) -> str:
    """At most six characters, so that the table fits."""
    if tokens_per_second < 1e5:
        return f"{tokens_per_second:,.0f}"
    return f"{tokens_per_second / 1e3:,.0f}k"
