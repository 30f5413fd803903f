"""A model and its tokenizer, loaded together."""

from __future__ import annotations

import os
from pathlib import Path

from bkcore_runtime import manifest
from bkcore_runtime.engine import Engine
from bkcore_runtime.errors import CheckpointError
from bkcore_runtime.tokenizer import Tokenizer


def load(
    folder: str | os.PathLike[str], *, threads: int | None = None, isa: str | None = None
) -> tuple[Engine, Tokenizer]:
    """Load the model and the tokenizer in a checkpoint folder.

    Args:
        folder: what `save_pretrained` of both wrote.
        threads, isa: as `Engine` takes them.

    Raises:
        CheckpointError: as `Engine` and `Tokenizer`, or if they do not belong together.
        InputError: as `Engine`.
    """
    folder = Path(folder)
    digests = manifest.read(folder)  # once, so that both are from the same checkpoint
    engine = Engine(folder, threads=threads, isa=isa, digests=digests)
    tokenizer = Tokenizer(folder, digests=digests)
    if tokenizer.largest_id >= engine.vocabulary:
        raise CheckpointError(
            f"the tokenizer in {folder} has the id {tokenizer.largest_id}, but the model has only "
            f"{engine.vocabulary} tokens; it is the tokenizer of another model"
        )
    return engine, tokenizer
