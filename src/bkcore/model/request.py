"""What `from_pretrained` was asked for: every argument is honoured, or refused by name."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from bkcore import manifest
from bkcore.errors import CheckpointError, InputError
from bkcore.model.config import ResNetBKConfig
from bkcore.reading import shown

ADAPTERS = "adapter_config.json"
"""What a folder with adapters holds."""

_PASSED_ON = {"device_map", "max_memory"}

_CHANGEABLE = {
    *ResNetBKConfig.__dataclass_fields__,
    *("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "output_attentions"),
}
"""Fields of a configuration, which `from_pretrained` takes, too."""

_WITHOUT_EFFECT = {
    *("cache_dir", "force_download", "local_files_only", "proxies", "revision", "token"),
    *("trust_remote_code", "code_revision", "low_cpu_mem_usage", "weights_only"),
    *("adapter_kwargs", "_from_auto", "_from_pipeline", "_commit_hash"),
}
"""Arguments of `from_pretrained` about downloads, pickles and code, of which there are none."""


@dataclass(frozen=True)
class Request:
    """What `from_pretrained` was asked for.

    Attributes:
        folder: where the checkpoint is.
        variant: which variant of the weights must be there; None takes any.
        config: to use instead of the one in the folder; None takes that.
        changes: fields of the configuration to change.
        generation: to use instead of what the folder holds; None takes that.
        dtype: of the parameters; None takes the configuration's, or that of the weights.
        wants_info: whether the loading info is to be returned, too.
        passed_on: arguments that transformers handles.
        digests: what the manifest lists, if it was read already; None reads it.
    """

    folder: Path
    variant: str | None
    config: ResNetBKConfig | None
    changes: dict[str, Any]
    generation: GenerationConfig | None
    dtype: torch.dtype | None
    wants_info: bool
    passed_on: dict[str, Any]
    digests: manifest.Digests | None

    @staticmethod
    def of(path: object, arguments: tuple[Any, ...], options: dict[str, Any]) -> Request:
        """What the arguments of `from_pretrained` ask for.

        Raises:
            InputError: for what cannot be had.
            CheckpointError: if transformers took the path from that of adapters.
        """
        folder = _folder(path, arguments)
        if "_adapter_model_path" in (options.get("adapter_kwargs") or {}):
            refuse_adapters(options["adapter_kwargs"]["_adapter_model_path"])
        options = {
            name: each
            for name, each in options.items()
            # Wrappers give None for what nobody asked for; of a field it is a value.
            if name not in _WITHOUT_EFFECT and (each is not None or name in _CHANGEABLE)
        }
        _drop_the_only_choices(options)
        config = options.pop("config", None)
        if config is not None and not isinstance(config, ResNetBKConfig):
            raise InputError(f"config must be a ResNetBKConfig, not {shown(config)}")
        generation = options.pop("generation_config", None)
        if generation is not None and not isinstance(generation, GenerationConfig):
            raise InputError(f"generation_config must be such an object, not {shown(generation)}")
        older = options.pop("torch_dtype", None)
        request = Request(
            folder=folder / (options.pop("subfolder", None) or ""),
            variant=options.pop("variant", None),
            config=config,
            dtype=_dtype(options.pop("dtype", older)),
            generation=generation,
            digests=options.pop("digests", None),
            wants_info=options.pop("output_loading_info", False),
            passed_on={name: options.pop(name) for name in _PASSED_ON & options.keys()},
            changes=options,
        )
        unknown = sorted(options.keys() - _CHANGEABLE)
        if unknown or (config is not None and options):
            given = unknown or sorted(options)
            raise InputError(
                f"from_pretrained cannot take {given}; it takes config or fields of one, dtype, "
                "device_map, max_memory, generation_config, subfolder, variant and "
                "output_loading_info"
            )
        return request


def refuse_adapters(folder: object) -> None:
    """Raise `CheckpointError`, since a folder holds adapters."""
    raise CheckpointError(
        f"{shown(str(folder))} holds adapters ({ADAPTERS}), without which the model is not what "
        "was saved there: keep the adapter's files in a folder without a model, load the model "
        "from its own, then call model.load_adapter() with the adapter's; or delete them if they "
        "are of no use"
    )


def _folder(path: object, arguments: tuple[Any, ...]) -> Path:
    if not isinstance(path, str | os.PathLike):
        raise InputError(f"from_pretrained takes the path of a folder, not {shown(path)}")
    if arguments:
        raise InputError(f"from_pretrained takes names with arguments, not {shown(arguments)}")
    return Path(path)


def _drop_the_only_choices(options: dict[str, Any]) -> None:
    """Take out the options that have one possible value; `InputError` if one has another."""
    for name, only in (("use_safetensors", True), ("ignore_mismatched_sizes", False)):
        if options.pop(name, None) not in (None, only):
            raise InputError(f"from_pretrained can only do what {name}={only} asks for")
    for name in ("attn_implementation", "experts_implementation"):
        if options.pop(name, None) not in (None, "eager"):
            raise InputError(f"this model has no {name}; leave it out")


def _dtype(asked: object) -> torch.dtype | None:
    dtype = getattr(torch, asked, None) if isinstance(asked, str) else asked
    if asked is None or asked == "auto":
        return None
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise InputError(f'dtype must be "auto" or a floating-point dtype, not {shown(asked)}')
    return dtype
