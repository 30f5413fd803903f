"""Byte-level BPE: any text becomes token ids and comes back unchanged."""

import copy
import hashlib
import json
import re
from collections.abc import Iterator

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from bkcore.errors import InputError

END_OF_TEXT = "<|endoftext|>"
"""The one special token: it begins and ends a text. Its id is 0."""

MIN_VOCAB_SIZE = 257
"""The 256 bytes and the special token."""

# A byte-level word never reaches past a visible character into the blank that follows it, so a
# text cut there, before a whole run of whitespace, gives the same tokens as the text in one piece.
_CUT = re.compile(r"[!-~](?=[ \n])")
_CHUNK_CHARACTERS = 16_384


def train_tokenizer(
    text: str, vocab_size: int, *, min_frequency: int = 2
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer. The same text and sizes give the same tokenizer.

    Args:
        text: what to count pairs in; may be short, down to nothing.
        vocab_size: at most this many tokens, at least 257: the 256 bytes and ``<|endoftext|>``.
            A short text runs out of pairs before: ``len(tokenizer)`` is the size it has.
        min_frequency: a pair seen less often is never merged, at least 1.

    Returns:
        A tokenizer whose beginning and end of text are both ``<|endoftext|>`` (id 0), which
        it adds nowhere by itself, and for which ``decode(encode(text))`` is the text.

    Raises:
        InputError: ``vocab_size`` or ``min_frequency`` is too small, or the text holds a lone
            surrogate.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise InputError(
            f"vocab_size is {vocab_size}, but the 256 bytes and {END_OF_TEXT} need at least "
            f"{MIN_VOCAB_SIZE}."
        )
    if min_frequency < 1:
        raise InputError(f"min_frequency is {min_frequency}, but must be at least 1.")
    _check_encodable(text)
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(_chunks(text), trainer=trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )


def tokenizer_hash(tokenizer: PreTrainedTokenizerFast) -> str:
    """Name a tokenizer by what it does to text: 16 hexadecimal digits of a SHA-256.

    Saving and loading keep it; padding and truncation, which a call may change, are left out.
    """
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    for changeable in ("padding", "truncation"):
        content.pop(changeable)
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def encode(tokenizer: PreTrainedTokenizerFast, text: str) -> Tensor:
    """Turn a whole text into token ids, with no special token added or recognized.

    A literal ``<|endoftext|>`` in the text is text like any other. Long texts are cut into
    pieces that are encoded in parallel; the cuts do not show in the result.

    Args:
        tokenizer: a byte-level tokenizer, such as `train_tokenizer` gives.
        text: any text.

    Returns:
        An int64 tensor of shape (tokens,), with values in [0, len(tokenizer)).

    Raises:
        InputError: the text holds a lone surrogate, which no UTF-8 text can.
    """
    _check_encodable(text)
    if not text:
        return torch.empty(0, dtype=torch.int64)
    backend = copy.deepcopy(tokenizer.backend_tokenizer)
    backend.no_padding()
    backend.no_truncation()
    backend.encode_special_tokens = True
    pieces = backend.encode_batch_fast(list(_chunks(text)), add_special_tokens=False)
    return torch.cat([torch.tensor(piece.ids, dtype=torch.int64) for piece in pieces])


def _check_encodable(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"The text holds a lone surrogate at character {error.start}, which UTF-8 cannot "
            "express. Read or build the text as valid Unicode."
        ) from error


def _chunks(text: str) -> Iterator[str]:
    start = 0
    while start < len(text):
        cut = _CUT.search(text, start + _CHUNK_CHARACTERS)
        end = cut.end() if cut else len(text)
        yield text[start:end]
        start = end
