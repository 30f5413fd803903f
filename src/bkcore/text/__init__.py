"""From text to token windows: corpora, the tokenizer, and windows for training and scoring."""

from typing import TYPE_CHECKING

from bkcore.lazy import lazy_names

if TYPE_CHECKING:
    from bkcore.text.cache import cached_tokenizer, cached_tokens
    from bkcore.text.corpus import (
        Corpus,
        StreamedCorpus,
        count_words,
        load_corpus,
        load_split,
        open_corpus,
    )
    from bkcore.text.origin import Origin, is_part_of, origin_of, warning_of_other_text
    from bkcore.text.saved import list_tokenizer, load_tokenizer
    from bkcore.text.shards import TokenShards, write_shards
    from bkcore.text.tokenizer import (
        END_OF_TEXT,
        encode,
        encode_pieces,
        tokenizer_hash,
        train_tokenizer,
    )
    from bkcore.text.windows import TokenWindows, scored_windows, spread
else:
    __getattr__ = lazy_names(
        __name__,
        {
            "cache": "cached_tokenizer cached_tokens",
            "corpus": "Corpus StreamedCorpus count_words load_corpus load_split open_corpus",
            "origin": "Origin is_part_of origin_of warning_of_other_text",
            "saved": "list_tokenizer load_tokenizer",
            "shards": "TokenShards write_shards",
            "tokenizer": "END_OF_TEXT encode encode_pieces tokenizer_hash train_tokenizer",
            "windows": "TokenWindows scored_windows spread",
        },
    )

__all__ = [
    "END_OF_TEXT",
    "Corpus",
    "Origin",
    "StreamedCorpus",
    "TokenShards",
    "TokenWindows",
    "cached_tokenizer",
    "cached_tokens",
    "count_words",
    "encode",
    "encode_pieces",
    "is_part_of",
    "list_tokenizer",
    "load_corpus",
    "load_split",
    "load_tokenizer",
    "open_corpus",
    "origin_of",
    "scored_windows",
    "spread",
    "tokenizer_hash",
    "train_tokenizer",
    "warning_of_other_text",
    "write_shards",
]


def __dir__() -> list[str]:
    return __all__
