"""Text to token ids and back, as the tokenizer in a checkpoint folder has it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers.decoders import DecodeStream
from tokenizers.models import BPE

from bkcore_runtime import manifest
from bkcore_runtime.errors import CheckpointError, InputError, UnsupportedError
from bkcore_runtime.reading import foreign, parse_json, shown

_BYTES = 128 << 20
_SETTINGS = "tokenizer_config.json"
_OF_TRANSFORMERS = ("add_bos_token", "add_eos_token", "add_prefix_space", "split_special_tokens")
"""Settings that make transformers change what `tokenizer.json` says."""


class Tokenizer:
    """The tokenizer in a checkpoint folder: its `tokenizer.json`, checked against the manifest.

    Args:
        folder: the folder.
        digests: the result of `bkcore_runtime.manifest.read(folder)`, to read exactly those files
            or fail.

    Attributes:
        largest_id: the largest token id, or -1 if there are no tokens.

    Raises:
        CheckpointError: if there is no tokenizer, or it is not listed, altered or damaged.
        UnsupportedError: if transformers would change it by a setting of `tokenizer_config.json`.
    """

    def __init__(
        self, folder: str | os.PathLike[str], *, digests: manifest.Digests | None = None
    ) -> None:
        folder = Path(folder)
        listed = manifest.read(folder) if digests is None else digests
        content = manifest.contents(folder, manifest.TOKENIZER, listed, _BYTES)
        with foreign(f"the tokenizer in {folder}"):
            self._tokenizer = tokenizers.Tokenizer.from_buffer(content)
            self._tokenizer.no_truncation()
            self._tokenizer.no_padding()
            self.largest_id = max(self._tokenizer.get_vocab().values(), default=-1)
            _check_settings(folder, listed, self._tokenizer)

    def encode(self, text: str) -> list[int]:
        """The ids of a text.

        Raises:
            InputError: if the text is empty, has no tokens, or contains lone surrogates.
        """
        check_text(text)
        ids: list[int] = self._tokenizer.encode(text).ids
        if not ids:
            raise InputError(f"the tokenizer finds no tokens in {shown(text)}")
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some ids, without special tokens.

        Characters of which only a part is there become U+FFFD.

        Raises:
            InputError: if an id is negative or too large.
        """
        try:
            return str(self._tokenizer.decode(list(map(int, ids)), skip_special_tokens=True))
        except OverflowError as error:
            raise InputError(f"ids must be from 0 to 2^32 - 1, not {shown(ids)}") from error

    def stream(self, ids: Iterable[int], after: Sequence[int] = ()) -> Iterator[str]:
        """The text of ids piece by piece, as they come; together the pieces are the whole text.

        A character whose bytes belong to several tokens comes when it is complete. What is still
        incomplete at the end comes then, as U+FFFD.

        Args:
            ids: may be an iterator that makes them.
            after: ids of the text that they continue. It is not repeated.
        """
        every = list(after)
        done = len(self.decode(every))
        stream = DecodeStream(ids=every, skip_special_tokens=True)
        for each in ids:
            every.append(each)
            piece = stream.step(self._tokenizer, each)
            if piece:
                done += len(piece)
                yield piece
        rest = self.decode(every)[done:]
        if rest:
            yield rest


def check_text(text: str) -> None:
    """Raise `InputError` if a text to continue is empty or contains lone surrogates."""
    if not isinstance(text, str) or not text:
        raise InputError("the prompt is empty; give at least one character")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise InputError(f"the prompt {text!r} is not valid UTF-8 text")


def _check_settings(
    folder: Path, digests: manifest.Digests, tokenizer: tokenizers.Tokenizer
) -> None:
    """Refuse a tokenizer that transformers would change."""
    if _SETTINGS not in digests:
        return
    settings: Any = parse_json(manifest.contents(folder, _SETTINGS, digests))
    if not isinstance(settings, dict):
        raise CheckpointError(f"{folder / _SETTINGS} must hold a JSON object")
    changing = [name for name in _OF_TRANSFORMERS if settings.get(name)]
    cleaned = settings.get("clean_up_tokenization_spaces")
    if cleaned and not isinstance(tokenizer.model, BPE):
        changing.append("clean_up_tokenization_spaces")
    if changing:
        raise UnsupportedError(
            f"the engine does not read the tokenizer in {folder}: transformers would change it by "
            f"{', '.join(changing)} in {_SETTINGS}"
        )
