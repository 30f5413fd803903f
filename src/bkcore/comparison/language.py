"""Language modelling: one trainer, one tokenizer, one budget, equal active parameters."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from bkcore.comparison import contestants
from bkcore.comparison.contestants import (
    Contestant,
    Frame,
    active_parameters,
    open_size,
    total_parameters,
)
from bkcore.comparison.runs import Advance, Run, StepTimes
from bkcore.comparison.selective_scan import fast_selective_scan
from bkcore.comparison.settings import LanguageSettings
from bkcore.evaluation.evaluate import check_length
from bkcore.evaluation.perplexity import (
    Protocol,
    Scores,
    perplexity_per_token,
    perplexity_per_word,
    score,
    standard_error,
)
from bkcore.text import (
    Corpus,
    TokenWindows,
    count_words,
    encode,
    tokenizer_hash,
    train_tokenizer,
)
from bkcore.training import Schedule, train

GROUP = "language"

CONTESTANTS: dict[Contestant, tuple[int, ...]] = {
    contestants.RESNET_BK: (0, 1),
    contestants.CONVOLUTION: (0, 1),
    contestants.GREEN: (0,),
    contestants.EXPERTS: (0,),
    contestants.GPT2: (0,),
    contestants.LLAMA: (0,),
    contestants.MAMBA: (0,),
}
"""The contestants, with their seeds."""


class LanguageComparison:
    """The runs on one corpus; its tokenizer is trained when the first run needs it."""

    def __init__(self, corpus: Corpus, settings: LanguageSettings) -> None:
        self.corpus = corpus
        self.settings = settings

    def runs(self, seeds: Sequence[int] | None = None) -> list[Run]:
        """All runs, with the seeds of `CONTESTANTS` or with other ones."""
        return [
            Run(
                name=f"{GROUP}/{contestant.name}/seed{seed}",
                settings=partial(self._settings_of, contestant, seed),
                execute=partial(self._execute, contestant, seed),
                weight=1.5 * self.settings.steps + 40,
            )
            for contestant, planned in CONTESTANTS.items()
            for seed in (planned if seeds is None else seeds)
        ]

    def _settings_of(self, contestant: Contestant, seed: int) -> dict[str, Any]:
        text = hashlib.sha256((self.corpus.train + "\0" + self.corpus.valid).encode())
        return {
            **asdict(self.settings),
            "corpus": self.corpus.name,
            "corpus_sha256": text.hexdigest(),
            "learning_rate": contestant.learning_rate,
            "open_size": self._open_size(contestant),
            "seed": seed,
        }

    @property
    def frame(self) -> Frame:
        """The sizes that the models share."""
        settings = self.settings
        mixers = round(settings.layers * 5 / 3)  # as many as Mamba's layers, with small perceptrons
        return Frame(settings.vocab_size, settings.window, settings.width, settings.layers, mixers)

    def _open_size(self, contestant: Contestant) -> int:
        return open_size(contestant, self.frame, self.settings.parameters)

    @cached_property
    def _tokenizer(self) -> PreTrainedTokenizerFast:
        return train_tokenizer(self.corpus.train, self.settings.vocab_size)

    @cached_property
    def _windows(self) -> TokenWindows:
        return TokenWindows(encode(self._tokenizer, self.corpus.train), self.settings.window)

    @cached_property
    def _valid(self) -> Tensor:
        return encode(self._tokenizer, self.corpus.valid)

    def _execute(
        self, contestant: Contestant, seed: int, folder: Path, advance: Advance
    ) -> dict[str, Any]:
        settings = self.settings
        schedule = Schedule(settings.steps, settings.batch_size, contestant.learning_rate)
        size = self._open_size(contestant)
        torch.manual_seed(seed)
        model = contestant.build(self.frame, size)
        windows = self._windows
        times = StepTimes(folder / "steps.txt")

        def on_step(step: int) -> None:
            times(step)
            advance(step / (schedule.steps + 1))

        check_length(self._valid, settings.window)
        with fast_selective_scan():
            log = train(model, windows, schedule, seed=seed, output=folder, on_step=on_step)
            scores = score(
                model,
                self._valid,
                window=settings.window,
                batch_size=settings.batch_size,
                bos_id=self._tokenizer.bos_token_id,
            )
        words = count_words(self.corpus.valid)
        seconds = times.seconds()
        tokens_a_step = settings.batch_size * settings.window
        row = {
            "contestant": contestant.name,
            "seed": seed,
            "ppl_token": perplexity_per_token(scores),
            "ppl_word": perplexity_per_word(scores, words),
            "standard_error_nats": standard_error(scores),
            "active_parameters": active_parameters(model),
            "total_parameters": total_parameters(model),
            "open_size": {contestant.size_name: size},
            "training_tokens": schedule.steps * tokens_a_step,
            "schedule": asdict(schedule),
            "tokens_per_second": tokens_a_step / seconds["seconds_per_step"],
            **seconds,
            "threads": torch.get_num_threads(),
            "log": log,
        }
        return {
            "row": row,
            "scores": scores.as_dict(),
            "protocol": self._protocol(scores, words),
        }

    def _protocol(self, scores: Scores, words: int) -> dict[str, Any]:
        evaluation = Protocol(
            tokenizer_hash(self._tokenizer),
            "valid",
            self.settings.window,
            scores.total_tokens,
            words,
            len(self.corpus.valid.encode()),
            self.settings.batch_size,
        )
        return {
            "corpus": self.corpus.name,
            "settings": asdict(self.settings),
            "evaluation": evaluation.as_dict(),
        }
