"""Making a trained model small enough to hand on, without quantizing it."""

from __future__ import annotations

from pathlib import Path

from bkcore.errors import InputError
from bkcore.evaluation.checkpoints import load_checkpoint, save_checkpoint
from bkcore.evaluation.samples import load_samples
from bkcore.outputs import prepare_folder
from bkcore.report.files import refuse_model


def export_half(checkpoint: Path, output: Path) -> None:
    """Save a float checkpoint and its tokenizer in float16.

    Args:
        checkpoint: folder with a float model and its tokenizer.
        output: folder to write, another one.

    Raises:
        InputError: if the model is quantized, whose weights float16 would not make smaller, or
            both folders are the same, or `output` holds a float model or cannot be written in.
        CheckpointError: if the checkpoint cannot be loaded, or the folder not written.
    """
    if output.resolve() == checkpoint.resolve():
        raise InputError(f"{output} is the checkpoint itself; name another folder")
    refuse_model(output)
    prepare_folder(output)
    model, tokenizer = load_checkpoint(checkpoint)
    state = (model.config.quantization or {}).get("state", "float")
    if state != "float":
        raise InputError(
            f"{checkpoint} is {state}, and only float models are exported in float16; "
            "export the float checkpoint it was made from"
        )
    save_checkpoint(
        output, model.half(), tokenizer, load_samples(checkpoint, model.config.vocab_size)
    )
