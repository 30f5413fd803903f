"""`bkcore compare`: ResNet-BK, its ablations, GPT-2, Llama and Mamba, trained alike."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bkcore.commands.files import Files
from bkcore.commands.options import DataOption, JsonOption
from bkcore.commands.running import keeping, start_work, use_free_cores
from bkcore.comparison.settings import LanguageSettings, SyntheticSettings
from bkcore.display.console import Console, say


def compare(
    data: DataOption = None,
    json_file: JsonOption = None,
    output: Annotated[
        Path, typer.Option(help="Folder for the runs; finished ones are not repeated.")
    ] = Path("runs/compare"),
    only: Annotated[
        str, typer.Option(help="Only runs whose names start with this, such as language/mamba.")
    ] = "",
    seed: Annotated[
        int | None, typer.Option(min=0, help="This seed instead of the planned ones.")
    ] = None,
    tokens: Annotated[
        int, typer.Option(min=1, help="Training tokens for each language model.")
    ] = LanguageSettings.training_tokens,
    steps: Annotated[
        int, typer.Option(min=1, help="Training steps for each run of a synthetic task.")
    ] = SyntheticSettings.steps,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads; default: the number of free cores.")
    ] = None,
) -> None:
    """Train ResNet-BK, its ablations, GPT-2, Llama and Mamba in the same way, and compare them.

    Each run can be interrupted and continued; several processes may share the work.
    """
    console, files = Console(), Files(json_file)
    files.prepare({"--output": output}, data=data)
    start_work()
    import torch

    from bkcore.comparison.compare import Comparison, run_comparison
    from bkcore.comparison.tables import language_table, synthetic_table

    if threads is None:
        use_free_cores()
    else:
        torch.set_num_threads(threads)
    comparison = Comparison(
        LanguageSettings(training_tokens=tokens), SyntheticSettings(steps=steps)
    )
    with keeping(f"{output} keeps what was trained; the same command continues from there"):
        result = run_comparison(comparison, data, output, console, only, seed)

    def show() -> None:
        if result["language"]:
            console.print(language_table(result))
        if result["synthetic"]:
            console.print(synthetic_table(result))
        if result["unfinished"]:
            say(console, "unfinished: " + ", ".join(result["unfinished"]))

    files.publish(show, result)
