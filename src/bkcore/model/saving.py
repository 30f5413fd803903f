"""Saving a model: where transformers writes, and what it is not asked to do."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from bkcore import manifest
from bkcore.errors import BKCoreError, CheckpointError, InputError
from bkcore.reading import shortened, shown

_VARIANT = re.compile(r"[A-Za-z0-9_-]+")


def check_arguments(options: dict[str, Any]) -> None:
    """Check the arguments of `save_pretrained`.

    Raises:
        InputError: for what cannot be had.
    """
    if options.get("safe_serialization") is False:
        raise InputError("checkpoints are safetensors only; drop safe_serialization=False")
    if options.get("push_to_hub"):
        raise InputError(
            "push_to_hub would upload a folder without its manifest: save the model, then call "
            "huggingface_hub.upload_folder(), or model.push_to_hub()"
        )
    if options.get("distributed_checkpoint"):
        raise InputError(
            "distributed checkpoints are no checkpoints of this library: "
            "bkcore.training.sharding.save_whole() saves a sharded model"
        )
    variant = options.get("variant")
    if variant is not None and not (isinstance(variant, str) and _VARIANT.fullmatch(variant)):
        raise InputError(
            f"variant must be made of letters, digits, _ and -, not {shown(variant)}: it is a part "
            "of a file's name"
        )


@contextmanager
def failing_in_words(folder: Path) -> Iterator[None]:
    """Turn what transformers raises while it writes to a folder into errors of this library.

    Raises:
        CheckpointError: if the folder cannot be written.
        InputError: if it refuses an argument, or the settings of generation.
    """
    try:
        yield
    except BKCoreError:
        raise
    except ValueError as error:
        raise InputError(f"nothing is saved to {folder}: {shortened(error)}") from error
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot write a checkpoint to {folder}: {error}") from error


@contextmanager
def place(folder: Path, options: dict[str, Any]) -> Iterator[Path]:
    """Where `save_pretrained` with these arguments writes.

    Raises:
        CheckpointError: as `manifest.saving_model`.
    """
    if options.get("is_main_process", True):
        with manifest.saving_model(folder) as staged:
            yield staged
        return
    with failing_in_words(folder), tempfile.TemporaryDirectory() as unused:
        yield Path(unused)  # the others gather their shares of the weights, and write nothing
