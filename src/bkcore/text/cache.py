"""The tokenizer and the token ids of a corpus, made once a folder."""

import os
import shutil
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from bkcore.text.corpus import StreamedCorpus
from bkcore.text.saved import CheckpointTokenizer, read_tokenizer
from bkcore.text.shards import TokenShards, write_shards
from bkcore.text.tokenizer import encode_pieces, tokenizer_hash, train_tokenizer


def cached_tokenizer(
    corpus: StreamedCorpus, vocab_size: int, folder: Path, *, min_frequency: int = 2
) -> CheckpointTokenizer:
    """Train a tokenizer on the train part of a corpus, or load the one that was trained before.

    Args:
        corpus: the text.
        vocab_size, min_frequency: as in `train_tokenizer`.
        folder: where it is kept, under a name made of the text's hash and the sizes.

    Raises:
        InputError: as in `train_tokenizer`.
        CheckpointError: if it cannot be written, or what is there is damaged.
    """
    name = f"tokenizer-{corpus.sha256[:16]}-{vocab_size}-{min_frequency}"
    if not (folder / name).exists():
        tokenizer = train_tokenizer(corpus.train(), vocab_size, min_frequency=min_frequency)
        staged = folder / f".{name}.saving"
        shutil.rmtree(staged, ignore_errors=True)
        tokenizer.save_pretrained(staged)
        os.replace(staged, folder / name)
    # Loaded even when it was just trained, so that the first run and the next do the same.
    return read_tokenizer(folder / name)


def cached_tokens(
    corpus: StreamedCorpus, tokenizer: PreTrainedTokenizerFast, folder: Path
) -> TokenShards:
    """Encode the train part of a corpus to disk, or open what was encoded before.

    Args:
        corpus: the text.
        tokenizer: see `cached_tokenizer`.
        folder: where it is kept, under a name made of the hashes of the text and the tokenizer.

    Raises:
        DataError: what is there is damaged, or the folder cannot be written.
    """
    key = tokenizer_hash(tokenizer)
    place = folder / f"tokens-{corpus.sha256[:16]}-{key}"
    if place.exists():
        return TokenShards(place)
    return write_shards(
        place,
        encode_pieces(tokenizer, corpus.train()),
        vocab_size=len(tokenizer),
        tokenizer_hash=key,
        text_hash=corpus.sha256,
    )
