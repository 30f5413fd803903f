"""Saving a model: transformers writes it beside the folder, and it moves there once complete."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from bkcore import manifest
from bkcore.errors import BKCoreError, CheckpointError, InputError, LifecycleError
from bkcore.model.loading import check_saved
from bkcore.model.quantizing import QuantizableModel
from bkcore.quantization import receipt_file
from bkcore.quantization.lifecycle import QuantizationState
from bkcore.reading import shortened, shown

_VARIANT = re.compile(r"[A-Za-z0-9_-]+")


def save(
    model: QuantizableModel,
    write: Callable[..., None],
    folder: str | Path,
    options: dict[str, Any],
) -> None:
    """`ResNetBKForCausalLM.save_pretrained`.

    Args:
        model: what to save.
        write: the model's `save_pretrained` of transformers.
        folder: where to save it.
        options: passed to `write`.

    Raises:
        As `save_pretrained`.
    """
    _check_arguments(options)
    place = Path(folder)
    if getattr(model, "_hf_peft_config_loaded", False):
        # Only the adapters are saved, in PEFT's files, which model.load_adapter() reads.
        with _failing_in_words(place):
            write(folder, **options)
        return
    if model.quantization_state is QuantizationState.CALIBRATING:
        raise LifecycleError("cannot save during calibration: call end_calibration() first")
    with _staged(place, options) as staged:
        with _failing_in_words(place):
            write(staged, **options)
        if options.get("is_main_process", True):
            if model.receipt is not None:
                receipt_file.write(model.receipt, staged)
            check_saved(type(model), staged, place)


def _check_arguments(options: dict[str, Any]) -> None:
    """Check the arguments of `save_pretrained`.

    Raises:
        InputError: if an argument cannot be honoured.
    """
    if options.get("safe_serialization") is False:
        raise InputError("checkpoints are safetensors only; drop safe_serialization=False")
    if options.get("push_to_hub"):
        raise InputError(
            "push_to_hub would upload a folder without its manifest; save the model, then call "
            "huggingface_hub.upload_folder(), or model.push_to_hub()"
        )
    if options.get("distributed_checkpoint"):
        raise InputError(
            "distributed_checkpoint is not supported; use bkcore.training.sharding.save_whole() "
            "to save a sharded model"
        )
    variant = options.get("variant")
    if variant is not None and not (isinstance(variant, str) and _VARIANT.fullmatch(variant)):
        raise InputError(
            "variant must consist of letters, digits, _ and -, since it becomes part of a file "
            f"name, not {shown(variant)}"
        )


@contextmanager
def _failing_in_words(folder: Path) -> Iterator[None]:
    """Turn what transformers raises while writing to a folder into errors of this library.

    Raises:
        CheckpointError: if the folder cannot be written.
        InputError: if transformers refuses an argument, or the generation settings.
    """
    try:
        yield
    except BKCoreError:
        raise
    except ValueError as error:
        raise InputError(f"nothing was saved to {folder}: {shortened(error)}") from error
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot write a checkpoint to {folder}: {error}") from error


@contextmanager
def _staged(folder: Path, options: dict[str, Any]) -> Iterator[Path]:
    """The folder that `save_pretrained` writes to with these arguments.

    Raises:
        CheckpointError: as `manifest.saving_model`.
    """
    if options.get("is_main_process", True):
        with manifest.saving_model(folder) as staged:
            yield staged
        return
    with _failing_in_words(folder), tempfile.TemporaryDirectory() as unused:
        yield Path(unused)  # other processes only contribute their shards, and write nothing
