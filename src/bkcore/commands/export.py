"""`bkcore export`: make a trained model small enough to share, without quantizing it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bkcore import manifest
from bkcore.commands.files import prepare_model, say_what_is_replaced
from bkcore.commands.running import start_work
from bkcore.display.console import Console, say
from bkcore.errors import InputError


def export(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint folder of a float model.")],
    output: Annotated[Path, typer.Argument(help="Folder to write.")],
) -> None:
    """Save a float checkpoint in float16, at half the size; bkcore's commands widen it again."""
    console = Console()
    prepare_model(output, checkpoint)
    manifest.read(checkpoint)
    say_what_is_replaced(console, [output])
    start_work()
    export_half(checkpoint, output)
    say(console, f"Checkpoint: {output}")


def export_half(checkpoint: Path, output: Path) -> None:
    """Save a float checkpoint and its tokenizer in float16.

    Args:
        checkpoint: folder with a float model and its tokenizer.
        output: another folder, to write.

    Raises:
        InputError: if the model is quantized (float16 would not make it smaller), both folders are
            the same, or `output` holds a float model or cannot be written in.
        CheckpointError: if the checkpoint cannot be loaded, or the folder cannot be written.
    """
    from bkcore.evaluation.checkpoints import load_checkpoint, save_checkpoint
    from bkcore.evaluation.samples import load_samples

    prepare_model(output, checkpoint)
    model, tokenizer = load_checkpoint(checkpoint)
    state = (model.config.quantization or {}).get("state", "float")
    if state != "float":
        raise InputError(
            f"{checkpoint} is {state}, but only float models are exported in float16; "
            "export the float checkpoint it was made from"
        )
    save_checkpoint(
        output, model.half(), tokenizer, load_samples(checkpoint, model.config.vocab_size)
    )
