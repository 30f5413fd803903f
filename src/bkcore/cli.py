"""The command line `bkcore`: collects its commands."""

from __future__ import annotations

from importlib.metadata import version
from typing import Annotated

import typer

from bkcore.commands import (
    bench,
    compare,
    demo,
    evaluate,
    export,
    generate,
    quantize,
    receipt,
    train,
)
from bkcore.commands.running import Command, run
from bkcore.host import keep_freed_memory
from bkcore.processes import leave

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="A quantized Birman-Schwinger core: small, linear-time language models in 8 or 4 bits.",
)
for command in (
    demo.demo,
    train.train,
    export.export,
    quantize.quantize,
    receipt.receipt,
    evaluate.evaluate,
    compare.compare,
    generate.generate,
):
    app.command(cls=Command)(command)
app.add_typer(bench.app, name="bench")


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


def main() -> None:
    """Run the command; for an error that bkcore raises, print one sentence and no traceback.

    The exit code is 1 if a benchmark found a wrong result or the process that it timed died, 130 or
    143 after an interruption, 141 if the output went into a closed pipe, and 2 for all other such
    errors.
    """
    keep_freed_memory()
    leave(run(app))
