"""Loading a model: a folder is checked against its configuration before memory is allocated.

Only the files in the manifest are read. transformers gets a configuration and tensors but never the
folder, so no library looks for more files there. A file that a stranger put into the folder is
never run, followed or taken for weights.
"""

from __future__ import annotations

import copy
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from bkcore import manifest
from bkcore.errors import CheckpointError
from bkcore.model.config import ResNetBKConfig
from bkcore.model.receipt import Receipt
from bkcore.model.request import ADAPTERS, Request, refuse_adapters
from bkcore.quantization import receipt_file
from bkcore.quantization.storage import StoredDtypes
from bkcore.reading import foreign, parse_json, shown

_logger = logging.getLogger(__name__)

_LAYER = re.compile(r"layers\.(\d{1,9})\.")
_EXPERT = re.compile(r"layers\.\d{1,9}\.experts\.experts\.(\d{1,9})\.")

_DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8},
    **{"U8": torch.uint8, "BOOL": torch.bool},
}
"""The dtypes a model can have, by their names in safetensors."""

_HALVES = (torch.float16, torch.bfloat16)


def load(
    kind: type[PreTrainedModel],
    build: Callable[..., Any],
    path: object,
    arguments: tuple[Any, ...],
    options: dict[str, Any],
) -> Any:
    """`ResNetBKForCausalLM.from_pretrained`.

    Args:
        kind: the class of the model.
        build: its `from_pretrained` of transformers.
        path, arguments, options: what the caller gave.

    Returns:
        The model; and transformers' loading info, if requested.

    Raises:
        As `from_pretrained`.
    """
    request = Request.of(path, arguments, options)
    with opened(request, kind) as source:
        model, info = build(
            None,
            config=source.config,
            state_dict=source.tensors,
            dtype=request.dtype or source.dtype,
            output_loading_info=True,
            **request.passed_on,
        )
    wrong = {name: keys for name, keys in info.items() if keys}
    if wrong:
        raise CheckpointError(f"the checkpoint {path} does not fit its configuration: {wrong}")
    if request.dtype is None and model.dtype in _HALVES and model.device.type == "cpu":
        _logger.warning(
            "%s is loaded in %s, as it is stored; on a CPU, dtype=torch.float32 is much faster",
            request.folder,
            str(model.dtype).removeprefix("torch."),
        )
    model.name_or_path = model.config.name_or_path = str(request.folder)
    model.receipt = source.receipt
    generation = request.generation or source.generation
    if generation is not None:
        model.generation_config = copy.deepcopy(generation)
    return (model, info) if request.wants_info else model


@dataclass(frozen=True)
class Source:
    """What a model is made of.

    Attributes:
        config: checked.
        tensors: by name; each is read when indexed.
        generation: the folder's generation configuration, or None.
        receipt: the folder's receipt, or None.
    """

    config: ResNetBKConfig
    tensors: dict[str, Any]
    generation: GenerationConfig | None
    receipt: Receipt | None

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the parameters unless the caller asks for another."""
        if isinstance(self.config.dtype, torch.dtype):
            return self.config.dtype
        floats = (_DTYPES[each.get_dtype()] for each in self.tensors.values())
        return next((dtype for dtype in floats if dtype.is_floating_point), torch.float32)


@contextmanager
def opened(request: Request, kind: type[PreTrainedModel]) -> Iterator[Source]:
    """The parts of a model of class `kind`, checked and complete; open inside a with block.

    Raises:
        CheckpointError: if the checkpoint is missing, truncated, altered, incomplete or malformed,
            or holds adapters.
    """
    folder = request.folder
    _check_no_adapters(folder)
    digests = manifest.read(folder) if request.digests is None else request.digests
    content = manifest.contents(folder, manifest.CONFIG, digests)
    config = config_from(content, folder / manifest.CONFIG, request.changes)
    if request.config is not None:
        config = request.config
    generation = None
    if manifest.GENERATION in digests:
        content = manifest.contents(folder, manifest.GENERATION, digests)
        generation = generation_from(content, folder / manifest.GENERATION)
    found = receipt_file.find(folder, digests)
    weights = sorted(filter(manifest.is_weights_file, digests))
    if request.variant is not None:
        _check_variant(request.variant, weights, folder)
    with ExitStack() as stack:
        files = []
        for name in weights:
            path, status = manifest.check(folder, name, digests)
            files.append(_open(path, folder / name, stack))
            if not manifest.is_same(path, status):
                raise CheckpointError(
                    f"{folder / name} changed while it was being read; load it again"
                )
        tensors = together(files, folder)
        check_fit(kind, config, tensors, folder)
        yield Source(config, tensors, generation, found)


def check_saved(kind: type[PreTrainedModel], staged: Path, folder: Path) -> None:
    """Check that the checkpoint in `staged` can be loaded, before it moves to `folder`.

    Raises:
        CheckpointError: if the configuration or the tensors are of another model (such as one with
            adapters) or cannot be in a checkpoint, or if `folder` holds adapters.
    """
    try:
        _check_no_adapters(folder)
        content = (staged / manifest.CONFIG).read_bytes()
        config = config_from(content, folder / manifest.CONFIG)
        if (staged / manifest.GENERATION).exists():
            content = (staged / manifest.GENERATION).read_bytes()
            generation_from(content, folder / manifest.GENERATION)
        with ExitStack() as stack:
            names = sorted(filter(manifest.is_weights_file, os.listdir(staged)))
            files = [_open(staged / name, folder / name, stack) for name in names]
            check_fit(kind, config, together(files, folder), folder)
    except CheckpointError as error:
        raise CheckpointError(f"the saved model could not be loaded again: {error}") from error


def config_from(
    content: bytes, path: Path, changes: Mapping[str, Any] | None = None
) -> ResNetBKConfig:
    """The configuration in a JSON file, with some fields changed.

    Raises:
        CheckpointError: if the file does not hold one.
    """
    fields = _object(content, path)
    with foreign(str(path)):
        config = ResNetBKConfig(**fields)
    # The caller's changes are not the file's fault: they raise InputError.
    return ResNetBKConfig(**{**fields, **changes}) if changes else config


def generation_from(content: bytes, path: Path) -> GenerationConfig:
    """The generation configuration in a JSON file.

    Raises:
        CheckpointError: if the file does not hold one.
    """
    fields = _object(content, path)
    defaults = vars(GenerationConfig())
    usual = {**defaults, **GenerationConfig._get_default_generation_params()}
    usual["early_stopping"] = None  # True, False or "never"
    for name, value in fields.items():
        if name not in defaults and (name.startswith("_") or hasattr(GenerationConfig, name)):
            raise CheckpointError(f"{path} has the unknown field {shown(name)}")
        if value is not None and not _is_like(value, usual.get(name)):
            raise CheckpointError(f"{name} in {path} cannot be {shown(value)}")
    with foreign(str(path)):
        config = GenerationConfig.from_dict(fields)
        # Like transformers, which can save an odd configuration again as long as it is unchanged.
        config._original_object_hash = hash(config)
        return config


def together(files: Iterable[Mapping[str, Any]], folder: Path) -> dict[str, Any]:
    """The tensors of all files together.

    Raises:
        CheckpointError: if two files hold a tensor of the same name.
    """
    tensors: dict[str, Any] = {}
    for file in files:
        twice = sorted(tensors.keys() & file.keys())
        if twice:
            raise CheckpointError(f"the weights in {folder} hold {shown(twice)} twice")
        tensors |= file
    return tensors


def check_fit(
    kind: type[PreTrainedModel], config: ResNetBKConfig, tensors: Mapping[str, Any], folder: Path
) -> None:
    """Check names, shapes and dtypes of tensors against a model's, without allocating memory.

    Raises:
        CheckpointError: naming what is missing or differs from the configuration.
    """
    for pattern, name in ((_LAYER, "n_layers"), (_EXPERT, "num_experts")):
        count = len({match[1] for match in map(pattern.match, tensors) if match})
        if count != getattr(config, name):
            raise CheckpointError(
                f"the checkpoint {folder} does not fit its configuration: {name} is "
                f"{getattr(config, name)}, but it has tensors for {count}"
            )
    with foreign(str(folder / manifest.CONFIG)), torch.device("meta"), no_init_weights():
        model = kind(config)
    own = model.state_dict()
    exact = _exact(model, own)
    amiss = [f"it lacks {shown(name)}" for name in own if name not in tensors]
    for name, tensor in tensors.items():
        shape, dtype = tuple(tensor.get_shape()), _DTYPES.get(tensor.get_dtype())
        if name not in own:
            amiss.append(f"{shown(name)} belongs to another model")
        elif shape != own[name].shape:
            amiss.append(f"{name} is {shape} instead of {tuple(own[name].shape)}")
        elif dtype != own[name].dtype and (
            name in exact or dtype is None or not dtype.is_floating_point
        ):
            amiss.append(f"{name} is {tensor.get_dtype()} instead of {own[name].dtype}")
    if amiss:
        more = f"; and {len(amiss) - 5} more" if len(amiss) > 5 else ""
        if any(".base_layer." in name for name in tensors):
            more += (
                "; its layers are wrapped by adapters, and deleting an adapter does not unwrap "
                "them; save what PEFT's merge_and_unload() or unload() returns"
            )
        raise CheckpointError(
            f"the checkpoint {folder} does not fit its configuration: {'; '.join(amiss[:5])}{more}"
        )


def _check_no_adapters(folder: Path) -> None:
    """Refuse a folder with adapters: without them the model would not compute what was saved."""
    try:
        present = os.path.lexists(folder / ADAPTERS)
    except ValueError:  # no system allows such a name, so nothing is there
        return
    if present:
        refuse_adapters(folder)


def _exact(model: nn.Module, own: Mapping[str, Tensor]) -> set[str]:
    """Names of the tensors with a fixed dtype; the others may have any floating dtype."""
    names = {name for name, x in own.items() if not x.is_floating_point()}
    for path, module in model.named_modules():
        if isinstance(module, StoredDtypes):
            names |= {f"{path}.{name}" for name in module.stored}
    return names


def _object(content: bytes, path: Path) -> dict[str, Any]:
    try:
        fields = parse_json(content)
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise CheckpointError(f"{path} must hold a JSON object, not {shown(fields)}")
    return fields


def _is_like(value: object, usual: object) -> bool:
    """Whether a value is of a type that may replace the usual one."""
    if isinstance(usual, bool) or isinstance(value, bool):
        return isinstance(value, bool) and isinstance(usual, bool | None)
    if isinstance(usual, int | float):
        return isinstance(value, int | float) and abs(value) <= torch.finfo(torch.float64).max
    return usual is None or isinstance(value, type(usual))


def _open(path: Path, shown_path: Path, stack: ExitStack) -> dict[str, Any]:
    with foreign(str(shown_path)):
        file = stack.enter_context(safe_open(path, framework="pt"))
        return {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118


def _check_variant(variant: object, weights: list[str], folder: Path) -> None:
    if not all(name.startswith((f"model.{variant}.", f"model.{variant}-")) for name in weights):
        raise CheckpointError(
            f"{folder} holds {', '.join(weights)}, not variant {shown(variant)}; leave variant out"
        )
