"""The arguments of `from_pretrained`: each is honoured, or refused by name."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from bkcore import manifest
from bkcore.arguments import did_you_mean
from bkcore.errors import CheckpointError, InputError
from bkcore.model.config import ResNetBKConfig
from bkcore.reading import shown

ADAPTERS = "adapter_config.json"
"""The file that shows that a folder holds adapters."""

_PASSED_ON = {"device_map", "max_memory"}

_CHANGEABLE = {
    *ResNetBKConfig.__dataclass_fields__,
    *("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "output_attentions"),
}
"""Fields of a configuration, which `from_pretrained` also takes."""

_TAKEN = {
    *_CHANGEABLE,
    *_PASSED_ON,
    *("config", "dtype", "generation_config", "subfolder", "variant", "output_loading_info"),
}
"""All arguments of `from_pretrained` that mean something here, but the path."""

_WITHOUT_EFFECT = {
    *("cache_dir", "force_download", "local_files_only", "proxies", "revision", "token"),
    *("trust_remote_code", "code_revision", "low_cpu_mem_usage", "weights_only"),
    *("adapter_kwargs", "_from_auto", "_from_pipeline", "_commit_hash"),
}
"""Arguments of `from_pretrained` about downloads, pickles and code, which do not occur here."""


@dataclass(frozen=True)
class Request:
    """The arguments of `from_pretrained`, checked.

    Attributes:
        folder: where the checkpoint is.
        variant: the variant that the weights must be of; None takes any.
        config: used instead of the folder's; None uses the folder's.
        changes: fields of the configuration to change.
        generation: used instead of the folder's; None uses the folder's.
        dtype: of the parameters; None uses the configuration's, or else that of the weights.
        wants_info: whether to return the loading info too.
        passed_on: arguments that transformers handles.
        digests: the manifest's entries, if already read; None reads them.
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
        """Check the arguments of `from_pretrained`.

        Raises:
            InputError: if an argument cannot be honoured.
            CheckpointError: if the caller named a folder of adapters, from which transformers took
                the path of the model.
        """
        folder = _folder(path, arguments)
        if "_adapter_model_path" in (options.get("adapter_kwargs") or {}):
            refuse_adapters(options["adapter_kwargs"]["_adapter_model_path"])
        options = {
            name: each
            for name, each in options.items()
            # Wrappers pass None for options that nobody set; for a field None is a value.
            if name not in _WITHOUT_EFFECT and (each is not None or name in _CHANGEABLE)
        }
        _drop_the_only_choices(options)
        config = options.pop("config", None)
        if config is not None and not isinstance(config, ResNetBKConfig):
            raise InputError(f"config must be a ResNetBKConfig, not {shown(config)}")
        generation = options.pop("generation_config", None)
        if generation is not None and not isinstance(generation, GenerationConfig):
            raise InputError(
                f"generation_config must be a GenerationConfig, not {shown(generation)}"
            )
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
                f"from_pretrained cannot take {given}; it takes config or its fields, dtype, "
                "device_map, max_memory, generation_config, subfolder, variant and "
                f"output_loading_info{did_you_mean(unknown, _TAKEN)}"
            )
        return request


def refuse_adapters(folder: object) -> None:
    """Raise `CheckpointError`, since a folder holds adapters."""
    raise CheckpointError(
        f"{shown(str(folder))} holds adapters ({ADAPTERS}), and without them the model would not "
        "compute what was saved; keep the adapter's files in a folder of their own, load the model "
        "from its folder and call model.load_adapter() with theirs; or delete them if you do not "
        "need them"
    )


def _folder(path: object, arguments: tuple[Any, ...]) -> Path:
    if not isinstance(path, str | os.PathLike):
        raise InputError(f"from_pretrained takes the path of a folder, not {shown(path)}")
    if arguments:
        raise InputError(
            "from_pretrained takes keyword arguments after the path, not the positional "
            f"{shown(arguments)}"
        )
    return Path(path)


def _drop_the_only_choices(options: dict[str, Any]) -> None:
    """Drop the options that have one possible value; `InputError` for any other value."""
    for name, only in (("use_safetensors", True), ("ignore_mismatched_sizes", False)):
        if options.pop(name, None) not in (None, only):
            raise InputError(f"from_pretrained supports only {name}={only}")
    for name in ("attn_implementation", "experts_implementation"):
        if options.pop(name, None) not in (None, "eager"):
            raise InputError(f"this model has no {name}; leave it out")


def _dtype(asked: object) -> torch.dtype | None:
    dtype = getattr(torch, asked, None) if isinstance(asked, str) else asked
    if asked is None or asked == "auto":
        return None
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        hint = did_you_mean(asked, ("auto", "float16", "bfloat16", "float32", "float64"))
        raise InputError(
            f'dtype must be "auto" or a floating-point dtype, not {shown(asked)}{hint}'
        )
    return dtype
