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
from bkcore_runtime.arguments import list_of_integers
from bkcore_runtime.errors import CheckpointError, DTypeError, InputError, UnsupportedError
from bkcore_runtime.reading import foreign, parse_json, shown

_BYTES = 128 << 20
_PART = "\ufffd"
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
        self._name = f"the tokenizer in {folder}"
        with foreign(self._name):
            self._tokenizer = tokenizers.Tokenizer.from_buffer(content)
            self._tokenizer.no_truncation()
            self._tokenizer.no_padding()
            self.largest_id = max(self._tokenizer.get_vocab().values(), default=-1)
            _check_settings(folder, listed, self._tokenizer)

    def encode(self, text: str) -> list[int]:
        """The ids of a text.

        Raises:
            InputError: if the text is empty, has no tokens, or contains lone surrogates.
            DTypeError: if it is no text.
            CheckpointError: if the tokenizer cannot encode it, as if it lacks a token for unknown
                words.
        """
        check_text(text)
        with foreign(self._name):
            ids: list[int] = self._tokenizer.encode(text).ids
        if not ids:
            raise InputError(f"the tokenizer finds no tokens in {shown(text)}")
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some ids, without special tokens.

        Characters of which only a part is there become U+FFFD.

        Raises:
            InputError: if an id is negative or too large.
            DTypeError: if an id is no integer.
            CheckpointError: if the tokenizer cannot decode them.
        """
        checked = _checked(ids)
        with foreign(self._name):
            return str(self._tokenizer.decode(checked, skip_special_tokens=True))

    def stream(self, ids: Iterable[int], after: Sequence[int] = ()) -> Iterator[str]:
        """The text of ids piece by piece, as they come; together the pieces are the whole text.

        A character whose bytes belong to several tokens comes when it is complete. What is still
        incomplete at the end comes then, as U+FFFD.

        Args:
            ids: may be an iterator that makes them.
            after: ids of the text that they continue. It is not repeated, except for a character at
                its end that is incomplete.

        Raises:
            InputError, DTypeError, CheckpointError: as `decode`.
        """
        every = _checked(after)
        told = len(self._complete(every))
        stream, done = self._stream(every)
        for each in ids:
            every += _checked([each])
            piece = self._step(stream, every[-1])
            new = piece[max(0, told - done) :]
            done += len(piece)
            if new:
                yield new
        rest = self.decode(every)[max(told, done) :]
        if rest:
            yield rest

    def _complete(self, ids: list[int]) -> str:
        """The text of ids without a character at its end of which only a part is there."""
        count = len(ids)
        # A complete U+FFFD is that of its own ids, not of a part of another character.
        while (text := self.decode(ids[:count])).endswith(_PART) and self.encode(text) != ids[
            :count
        ]:
            count -= 1
        return text

    def _stream(self, ids: list[int]) -> tuple[DecodeStream, int]:
        """A stream that has read ids, and how many characters of their text came out of it."""
        # The library loses the beginning of a stream if that ends inside a character.
        begun = len(ids)
        while (text := self.decode(ids[:begun])).endswith(_PART):
            begun -= 1
        stream = DecodeStream(ids=ids[:begun], skip_special_tokens=True)
        return stream, len(text) + sum(len(self._step(stream, each)) for each in ids[begun:])

    def _step(self, stream: DecodeStream, each: int) -> str:
        with foreign(self._name):
            return stream.step(self._tokenizer, each) or ""


def check_text(text: str) -> None:
    """Check a text to continue.

    Raises:
        InputError: if it is empty or contains lone surrogates.
        DTypeError: if it is no text.
    """
    if not isinstance(text, str):
        raise DTypeError(f"the prompt must be a str, not {shown(text)}")
    if not text:
        raise InputError("the prompt is empty; give at least one character")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"the prompt {shown(text)} is not valid UTF-8 text: {error}") from error


def _checked(ids: Iterable[int]) -> list[int]:
    """A copy of token ids, each from 0 to 2^32 - 1."""
    found = list_of_integers(ids, "ids")
    if found and not 0 <= min(found) <= max(found) < 1 << 32:
        raise InputError(f"ids must be from 0 to 2^32 - 1, not {shown(found)}")
    return found


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
