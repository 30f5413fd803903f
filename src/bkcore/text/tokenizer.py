"""Byte-level BPE: any text can be encoded, and decodes to exactly the same text."""

import copy
import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from itertools import islice

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.pre_tokenizers import PreTokenizer
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from bkcore.errors import InputError
from bkcore.text.saved import CheckpointTokenizer

END_OF_TEXT = "<|endoftext|>"
"""The one special token: it begins and ends a text. Its id is 0."""

MIN_VOCAB_SIZE = 257
"""The 256 bytes and the special token."""

# GPT-2's pattern, except that a run of one kind of character ends after 256 of them. Without this
# limit, a line of a million letters or blanks is one word, which takes quadratic time in training.
_WORD = (
    r"'(?:[sdmt]|re|ve|ll)"
    r"| ?\p{L}{1,256}| ?\p{N}{1,256}| ?[^\s\p{L}\p{N}]{1,256}"
    r"|\s{1,256}(?!\S)|\s{1,256}"
)

# A word never extends past a visible character into the blank after it. So a text cut there, before
# a whole run of whitespace, gives the same tokens as in one piece.
_CUT = re.compile(r"\S(?=[ \r\n])")
# The last blank of a run is a word of its own in the text, but not at the end of a chunk.
_LAST_BLANK = re.compile(r"[^\S\x1c-\x1f](?![^\S\x1c-\x1f])")
_CHUNK_CHARACTERS = 1 << 13
_LONGEST_CHUNK = 1 << 14
_CHUNKS_AT_ONCE = 32

_SURROGATE = re.compile("[\ud800-\udfff]")


def train_tokenizer(
    text: str | Iterable[str], vocab_size: int, *, min_frequency: int = 2
) -> CheckpointTokenizer:
    """Train a byte-level BPE tokenizer. The same text and sizes give the same tokenizer.

    Args:
        text: the text to count pairs in, whole or in pieces, which are never in memory together.
            It may be short or even empty.
        vocab_size: the largest number of tokens, at least 257: the 256 bytes and
            ``<|endoftext|>``. A short text may run out of pairs; ``len(tokenizer)`` is the actual
            size.
        min_frequency: pairs seen less often than this are never merged; at least 1.

    Returns:
        A tokenizer for which ``decode(encode(text))`` is the text. Its beginning and end of text
        are both ``<|endoftext|>`` (id 0), which it never adds by itself. It cuts a text into words
        by GPT-2's pattern, but at the latest after 256 letters, digits, blanks or other characters
        in a row. When saved, it lists its files in the manifest of a model's folder.

    Raises:
        InputError: if `vocab_size` or `min_frequency` is too small, or the text holds a lone
            surrogate.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise InputError(
            f"vocab_size must be at least {MIN_VOCAB_SIZE}, for the 256 bytes and {END_OF_TEXT}, "
            f"not {vocab_size}"
        )
    if min_frequency < 1:
        raise InputError(f"min_frequency must be at least 1, not {min_frequency}")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORD), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    pieces = [text] if isinstance(text, str) else text
    chunks = _chunks(_encodable(pieces), backend.pre_tokenizer)
    backend.train_from_iterator(chunks, trainer=trainer)
    return CheckpointTokenizer(
        tokenizer_object=backend,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )


def tokenizer_hash(tokenizer: PreTrainedTokenizerFast) -> str:
    """A name for what a tokenizer does to text: 16 hexadecimal digits of a SHA-256.

    Saving and loading preserve it. Padding and truncation, which a call may change, do not count.
    """
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    for changeable in ("padding", "truncation"):
        content.pop(changeable)
    canonical = json.dumps(content, sort_keys=True, allow_nan=False, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def encode(tokenizer: PreTrainedTokenizerFast, text: str) -> Tensor:
    """Turn a whole text into token ids, with no special token added or recognized.

    A literal ``<|endoftext|>`` in the text is text like any other. Long texts are cut into
    pieces that are encoded in parallel, which does not change the result, with one exception: a
    word of more than 16,382 characters is encoded in parts, so that memory stays bounded. Only
    tokenizers without a limit on the length of words can have such words.

    Args:
        tokenizer: a byte-level tokenizer, such as one from `train_tokenizer`.
        text: any text.

    Returns:
        An int64 tensor of shape (tokens,), with values in [0, len(tokenizer)).

    Raises:
        InputError: if the text holds a lone surrogate, which UTF-8 cannot express.
    """
    ids = list(encode_pieces(tokenizer, [text]))
    return torch.cat(ids) if ids else torch.empty(0, dtype=torch.int64)


def encode_pieces(tokenizer: PreTrainedTokenizerFast, pieces: Iterable[str]) -> Iterator[Tensor]:
    """Encode a text that comes in pieces, part by part.

    Args:
        tokenizer: as in `encode`.
        pieces: a text, cut anywhere; the joined result is `encode` of the joined text.

    Yields:
        Int64 tensors of shape (tokens,), tokens >= 1, for at most half a million characters each.

    Raises:
        InputError: if the text holds a lone surrogate, which UTF-8 cannot express.
    """
    backend = copy.deepcopy(tokenizer.backend_tokenizer)
    backend.no_padding()
    backend.no_truncation()
    backend.encode_special_tokens = True
    chunks = _chunks(_encodable(pieces), backend.pre_tokenizer)
    while batch := list(islice(chunks, _CHUNKS_AT_ONCE)):
        encodings = backend.encode_batch_fast(batch, add_special_tokens=False)
        yield torch.cat([torch.tensor(encoding.ids, dtype=torch.int64) for encoding in encodings])


def _encodable(pieces: Iterable[str]) -> Iterator[str]:
    done = 0
    for piece in pieces:
        if found := _SURROGATE.search(piece):
            raise InputError(
                f"the text holds a lone surrogate at character {done + found.start()}, which UTF-8 "
                "cannot express; read or build the text as valid Unicode"
            )
        yield piece
        done += len(piece)


def _chunks(pieces: Iterable[str], words: PreTokenizer | None) -> Iterator[str]:
    """Cut a text where a cut does not change the tokens, however the text came in pieces.

    The exception is a word of more than 16,382 characters, which a tokenizer without a limit may
    have: it is cut, because no chunk is longer than 16,384 characters.
    """
    buffer, searched = "", 0
    for piece in pieces:
        buffer += piece
        start = 0
        while end := _chunk_end(buffer, start, searched, words):
            yield buffer[start:end]
            start = end
        buffer = buffer[start:]
        # Whether to cut after the last character depends on the next one.
        searched = max(len(buffer) - 1, 0)
    if buffer:
        yield buffer


def _chunk_end(text: str, start: int, searched: int, words: PreTokenizer | None) -> int | None:
    """Where the chunk that begins at `start` ends; None if more text is needed to tell."""
    limit = start + _LONGEST_CHUNK
    if cut := _CUT.search(text, max(start + _CHUNK_CHARACTERS, searched), limit):
        return cut.end()
    if len(text) < limit:
        return None
    if words is None:  # the whole text is one word
        return limit
    # The pattern looks at most two characters past the end of a word ("'" begins "'ll").
    sure = _LONGEST_CHUNK - 2
    found = words.pre_tokenize_str(text[start:limit])
    ends = (start + end for _, (_, end) in reversed(found) if end <= sure)
    return next((end for end in ends if not _LAST_BLANK.match(text, end - 1)), limit)
