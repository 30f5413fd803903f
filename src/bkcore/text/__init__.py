"""From text to token windows: corpora, the tokenizer, and what models train and are scored on."""

from bkcore.text.corpus import Corpus, count_words, load_corpus
from bkcore.text.tokenizer import END_OF_TEXT, encode, tokenizer_hash, train_tokenizer
from bkcore.text.windows import TokenWindows, scored_windows

__all__ = [
    "END_OF_TEXT",
    "Corpus",
    "TokenWindows",
    "count_words",
    "encode",
    "load_corpus",
    "scored_windows",
    "tokenizer_hash",
    "train_tokenizer",
]
