"""Tokenizers in checkpoint folders: listed in the manifest, and checked before they are read."""

from __future__ import annotations

import copy
import json
import os
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from bkcore import manifest
from bkcore.errors import CheckpointError, InputError
from bkcore.reading import foreign, parse_json, read_bytes, shortened, shown

_TOKENIZER = "tokenizer.json"
_SETTINGS = "tokenizer_config.json"
_SPECIAL_TOKENS = "special_tokens_map.json"
_BYTES = 128 << 20
_IDS = 1 << 22

_TOKENS = {
    *PreTrainedTokenizerFast.SPECIAL_TOKENS_ATTRIBUTES,
    *("extra_special_tokens", "additional_special_tokens", "model_specific_special_tokens"),
}
_KNOWN = {
    *_TOKENS,
    *("added_tokens_decoder", "model_max_length", "padding_side", "truncation_side"),
    *("model_input_names", "clean_up_tokenization_spaces", "split_special_tokens"),
    *("add_prefix_space", "add_bos_token", "add_eos_token", "chat_template"),
    *("chat_control_tokens", "response_template", "errors", "legacy", "trim_offsets"),
    # how and where it was made, which does not affect the encoding
    *("tokenizer_class", "processor_class", "backend", "is_local", "local_files_only"),
    *("name_or_path", "special_tokens_map_file"),
}
"""Settings that a tokenizer may have, with any value."""


_OPENING = {
    *("auto_map", "vocab", "merges", "tokenizer_object", "from_slow", "fix_mistral_regex"),
    *("tokenizer_truncation", "tokenizer_padding", "post_processor"),
}
"""Settings that make transformers run, fetch or replace something."""


class CheckpointTokenizer(PreTrainedTokenizerFast):
    """A transformers tokenizer that lists its files in the manifest of the folder it is saved to.

    So a model and its tokenizer may be saved to the same folder in either order.
    """

    def save_pretrained(  # type: ignore[override]
        self, save_directory: str | Path, **kwargs: Any
    ) -> tuple[str, ...]:
        """Save the tokenizer; a manifest in the folder lists it afterwards.

        Args:
            save_directory: the folder, created if missing.
            kwargs: as in transformers. Chat templates go into `tokenizer_config.json`.

        Returns:
            The paths of the files.

        Raises:
            InputError: for `push_to_hub` or `filename_prefix`, which cannot be honoured.
            CheckpointError: if the folder cannot be written.
        """
        for name in ("push_to_hub", "filename_prefix"):
            if kwargs.get(name):
                raise InputError(f"{name} would save files without the manifest; leave it out")
        folder = Path(save_directory)
        with manifest.saving_tokenizer(folder) as staged:
            self._save(staged, {"save_jinja_files": False, **kwargs})
            names = sorted(os.listdir(staged))
        return tuple(str(folder / name) for name in names)

    def _save(self, staged: Path, options: dict[str, Any]) -> None:
        try:
            super().save_pretrained(staged, **options)
        except Exception as error:
            if type(error) is Exception:  # errors from Rust, such as a full disk
                raise OSError(shortened(error)) from error
            raise
        # A name that transformers knows, for loading the folder without this library.
        path = staged / _SETTINGS
        settings = json.loads(path.read_text(encoding="utf-8"))
        settings["tokenizer_class"] = PreTrainedTokenizerFast.__name__
        text = json.dumps(settings, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
        path.write_text(text + "\n", encoding="utf-8")


def load_tokenizer(
    folder: str | Path, digests: manifest.Digests | None = None
) -> CheckpointTokenizer:
    """Load the tokenizer in a checkpoint folder, checked against the manifest.

    Args:
        folder: the folder.
        digests: the result of `bkcore.manifest.read(folder)`, to load exactly those files or fail.

    Raises:
        CheckpointError: if there is no tokenizer, one of its files is not listed, truncated,
            altered or malformed, or as in `manifest.read`.
    """
    folder = Path(folder)
    listed = manifest.read(folder) if digests is None else digests
    present = [name for name in manifest.TOKENIZER_FILES if os.path.lexists(folder / name)]
    if _TOKENIZER not in {*present, *listed}:
        raise CheckpointError(
            f"{folder} holds no {_TOKENIZER}; save the tokenizer in the model's folder with "
            "tokenizer.save_pretrained(folder)"
        )
    unlisted = [name for name in present if name not in listed]
    if unlisted:
        raise CheckpointError(
            f"{folder / manifest.MANIFEST} does not list {', '.join(unlisted)}, so nothing shows "
            "that the model was trained with this tokenizer; if you know that it was, call "
            "bkcore.text.list_tokenizer(folder); tokenizers from bkcore.text.load_tokenizer() and "
            "train_tokenizer() list themselves when saved, those from AutoTokenizer do not"
        )

    def read(name: str) -> bytes | None:
        return manifest.contents(folder, name, listed, _BYTES) if name in listed else None

    return _tokenizer(read, folder)


def read_tokenizer(folder: Path) -> CheckpointTokenizer:
    """Load the tokenizer in a folder without a manifest.

    Raises:
        CheckpointError: if there is no tokenizer, or it is malformed.
    """

    def read(name: str) -> bytes | None:
        try:
            return read_bytes(folder / name, _BYTES)
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{folder / name} cannot be read: {error}") from error

    return _tokenizer(read, folder)


def list_tokenizer(folder: str | Path) -> None:
    """List the tokenizer in a checkpoint folder in its manifest, as it is now.

    Use it for a tokenizer saved by another library or an older version, after making sure that the
    model was trained with it.

    Raises:
        CheckpointError: if the folder holds no model or no tokenizer, the tokenizer is refused, or
            the folder cannot be written; its manifest then stays as it is.
    """
    place = Path(folder)
    manifest.read(place)
    read_tokenizer(place)
    manifest.list_tokenizer(place)
    load_tokenizer(place)


def largest_id(tokenizer: PreTrainedTokenizerFast) -> int:
    """The largest token id, or -1 if there are no tokens."""
    return max(tokenizer.get_vocab().values(), default=-1)


def _tokenizer(read: Callable[[str], bytes | None], folder: Path) -> CheckpointTokenizer:
    """Let transformers read a copy of the checked files, and nothing else."""
    contents = {name: read(name) for name in manifest.TOKENIZER_FILES}
    if contents[_TOKENIZER] is None:
        raise CheckpointError(f"{folder} holds no {_TOKENIZER}")
    settings = _object(contents[_SETTINGS] or b"{}", folder / _SETTINGS)
    unknown = [name for name in settings.keys() - _KNOWN if not _is_harmless(name, settings[name])]
    _refuse(unknown, folder / _SETTINGS)
    tokens = _object(contents[_SPECIAL_TOKENS] or b"{}", folder / _SPECIAL_TOKENS)
    _refuse(tokens.keys() - _TOKENS, folder / _SPECIAL_TOKENS)
    with _copied(contents) as place, foreign(f"the tokenizer in {folder}"):
        # Copying a tokenizer counts up to its largest id, and transformers 5.19 copies on loading.
        largest = max(Tokenizer.from_file(str(place / _TOKENIZER)).get_vocab().values(), default=-1)
        if largest >= _IDS:
            raise ValueError(f"it has the impossible token id {largest:,}")
        tokenizer = CheckpointTokenizer.from_pretrained(place, local_files_only=True)
        copy.deepcopy(tokenizer.backend_tokenizer)  # checks more, and encoding does it too
        _ = len(tokenizer), tokenizer.bos_token_id
    tokenizer.name_or_path = tokenizer.init_kwargs["name_or_path"] = str(folder)
    return tokenizer


@contextmanager
def _copied(contents: Mapping[str, bytes | None]) -> Iterator[Path]:
    with ExitStack() as stack:
        try:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            for name, content in contents.items():
                if content is not None:
                    (folder / name).write_bytes(content)
        except OSError as error:
            raise CheckpointError(
                f"cannot make a temporary copy of the tokenizer: {error}"
            ) from error
        yield folder


def _object(content: bytes, path: Path) -> dict[str, Any]:
    try:
        settings = parse_json(content)
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(settings, dict):
        raise CheckpointError(f"{path} must hold a JSON object, not {shown(settings)}")
    return settings


def _is_harmless(name: str, value: object) -> bool:
    """Whether a setting of other tokenizer classes names neither a file nor code."""
    if value is None or value in ({}, []):
        return True
    is_named = name in _OPENING or name.startswith("_") or name.endswith(("_file", "_files"))
    return isinstance(value, str | int | float) and not is_named


def _refuse(settings: Collection[str], path: Path) -> None:
    """Refuse settings that could make transformers open other files."""
    if settings:
        raise CheckpointError(
            f"{path} has settings that this library does not accept from a file: "
            f"{shown(sorted(settings))}; delete them there, or save the tokenizer again"
        )
