"""The tokenizer and the token ids of a corpus, cached in a folder."""

import os
import tempfile
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from bkcore.errors import CheckpointError
from bkcore.text.corpus import StreamedCorpus
from bkcore.text.saved import CheckpointTokenizer, read_tokenizer
from bkcore.text.shards import TokenShards, write_shards
from bkcore.text.tokenizer import encode_pieces, tokenizer_hash, train_tokenizer


def cached_tokenizer(
    corpus: StreamedCorpus, vocab_size: int, folder: Path, *, min_frequency: int = 2
) -> CheckpointTokenizer:
    """Train a tokenizer on the train part of a corpus, or load the cached one.

    Args:
        corpus: the text.
        vocab_size, min_frequency: as in `train_tokenizer`.
        folder: for the cache; the name there is made of the text's hash and the sizes.

    Raises:
        InputError: as in `train_tokenizer`.
        CheckpointError: if the tokenizer cannot be written, or the cached one is damaged.
    """
    name = f"tokenizer-{corpus.sha256[:16]}-{vocab_size}-{min_frequency}"
    if not (folder / name).exists():
        tokenizer = train_tokenizer(corpus.train(), vocab_size, min_frequency=min_frequency)
        _save(tokenizer, folder / name)
    # Loaded even if just trained, so that the first run does the same as later ones.
    return read_tokenizer(folder / name)


def _save(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Create the folder of a tokenizer, completely or not at all."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder.parent) as staged:
            tokenizer.save_pretrained(Path(staged) / folder.name)
            os.replace(Path(staged) / folder.name, folder)
    except OSError as error:
        raise CheckpointError(f"cannot write a tokenizer to {folder}: {error}") from error


def cached_tokens(
    corpus: StreamedCorpus, tokenizer: PreTrainedTokenizerFast, folder: Path
) -> TokenShards:
    """Encode the train part of a corpus to disk, or open the cached token ids.

    Args:
        corpus: the text.
        tokenizer: see `cached_tokenizer`.
        folder: for the cache; the name there is made of the hashes of text and tokenizer.

    Raises:
        DataError: if the cached ids are damaged, or the folder cannot be written.
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
