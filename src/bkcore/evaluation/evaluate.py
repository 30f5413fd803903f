"""Evaluating a saved checkpoint: loaded from its files and measured in a separate process."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn
from transformers.utils import logging as transformers_logging

from bkcore import manifest
from bkcore.errors import CheckpointError, InputError
from bkcore.evaluation.checkpoints import check_tokenizers, load_checkpoint
from bkcore.evaluation.logits import LanguageModel
from bkcore.evaluation.perplexity import (
    Protocol,
    Scores,
    kl_divergence,
    perplexity_per_token,
    score,
    standard_error,
)
from bkcore.evaluation.samples import windows_for
from bkcore.evaluation.unfinished import Unfinished
from bkcore.host import keep_freed_memory, torch_threads
from bkcore.manifest import model_bytes
from bkcore.model import ResNetBKForCausalLM
from bkcore.model.moe import counting_load
from bkcore.processes import ProcessDiedError, call_in_new_process
from bkcore.text import count_words, encode, tokenizer_hash

TOKENS_A_BATCH = 4096
_SPEED_BATCHES = 9


def batch_of(window: int) -> int:
    """Default number of windows of this length in a batch."""
    return windows_for(TOKENS_A_BATCH, window)


@dataclass(frozen=True)
class Setting:
    """How checkpoints are evaluated.

    Attributes:
        text: the split to score.
        split: its name.
        window: tokens per window.
        batch_size: windows per batch.
        threads: CPU threads.
        unfinished: folder for the scores so far, from which the next try continues if this one is
            interrupted or its result is lost; None keeps nothing.
    """

    text: str
    split: str
    window: int
    batch_size: int
    threads: int
    unfinished: Path | None = None


@dataclass(frozen=True)
class Scorer:
    """Scores models on one text.

    Attributes:
        tokens: int64 (tokens,), the windows concatenated.
        window: their length.
        batch_size: windows per batch.
        bos_id: the token before the first one.
    """

    tokens: Tensor
    window: int
    batch_size: int
    bos_id: int

    def __call__(self, model: LanguageModel) -> Scores:
        """Score a model."""
        return score(
            model,
            self.tokens,
            window=self.window,
            batch_size=self.batch_size,
            bos_id=self.bos_id,
        )


@dataclass(frozen=True)
class Evaluation:
    """The measurements of one checkpoint.

    Attributes:
        scores: negative log likelihoods per window.
        protocol: how they were measured.
        bytes: size of the model's files on disk.
        tokens_per_second: of forward passes over full batches; the median.
        speedup: how many times faster than the reference, the median of paired batches; 1 if the
            checkpoint is the reference.
        expert_load: tokens of the split that each expert served, one list for each layer with a
            router.
        kl_nats: mean KL divergence of the next-token distributions from the reference's, in nats;
            None if the checkpoint is the reference.
        kl_tokens: how many tokens that mean is over, the same that speed is measured on.
        kept: the file with the scores, for the caller to delete once the result is safe; None if
            the setting keeps nothing.
    """

    scores: Scores
    protocol: Protocol
    bytes: int
    tokens_per_second: float
    speedup: float
    expert_load: list[list[int]]
    kl_nats: float | None = None
    kl_tokens: int = 0
    kept: Path | None = None


@dataclass(frozen=True)
class Progress:
    """A perplexity while it is being measured.

    Attributes:
        fraction: the fraction of the split scored so far.
        perplexity: per token, over what is scored so far.
        error: its standard error, the perplexity times that of the mean in nats; None after one
            window.
    """

    fraction: float
    perplexity: float
    error: float | None

    def __str__(self) -> str:
        error = "" if self.error is None else f" ± {self.error:.2g}"
        return f"perplexity {self.perplexity:.2f}{error}"


def evaluate_checkpoint(
    folder: Path,
    setting: Setting,
    reference: Path | None = None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> Evaluation:
    """Load a checkpoint with its tokenizer, score a text, and time it against a reference.

    Args:
        folder: the checkpoint, with its tokenizer.
        setting: the text and how to score it.
        reference: checkpoint to time against, in alternation; None means itself.
        on_progress: called after every batch.

    Raises:
        CheckpointError: if a checkpoint, its tokenizer or the file of an interrupted evaluation
            cannot be loaded.
        InputError: if the text is not longer than a window, the reference has another tokenizer, or
            the model's logits are not finite.
        OutputError: if the scores so far cannot be saved.
    """
    with torch_threads(setting.threads):
        return _evaluation(folder, setting, reference, on_progress)


def _evaluation(
    folder: Path,
    setting: Setting,
    reference: Path | None,
    on_progress: Callable[[Progress], None],
) -> Evaluation:
    model, tokenizer = load_checkpoint(folder)
    tokens = encode(tokenizer, setting.text)
    check_length(tokens, setting.window)
    rival = model
    if reference is not None:
        rival, other = load_checkpoint(reference)
        check_tokenizers(tokenizer, other, folder, reference)
    unfinished = _unfinished(folder, setting)
    scores, expert_load = _score(
        model, tokens, tokenizer.bos_token_id, setting, unfinished, on_progress
    )
    batches = _full_batches(tokens, setting)
    rate, speedup = _time_in_alternation(rival, model, batches)
    protocol = Protocol(
        tokenizer_hash(tokenizer),
        setting.split,
        setting.window,
        scores.total_tokens,
        count_words(setting.text),
        len(setting.text.encode()),
        setting.batch_size,
    )
    found = Evaluation(
        scores,
        protocol,
        model_bytes(folder),
        rate,
        speedup,
        expert_load,
        kept=unfinished.path if unfinished else None,
    )
    if reference is None:
        return found
    kl_tokens = sum(batch.numel() for batch in batches)
    return replace(found, kl_nats=kl_divergence(rival, model, batches), kl_tokens=kl_tokens)


def check_length(tokens: Tensor, window: int) -> None:
    """Raise `InputError` if a text (tokens,) is a single window, which shows no spread."""
    if len(tokens) <= window:
        raise InputError(
            f"the text is one window: it has {len(tokens)} tokens, and a window has {window}; one "
            "window tells nothing about the spread; give more text or a shorter window"
        )


def _score(
    model: ResNetBKForCausalLM,
    tokens: Tensor,
    bos_id: int,
    setting: Setting,
    unfinished: Unfinished | None,
    on_progress: Callable[[Progress], None],
) -> tuple[Scores, list[list[int]]]:
    """Scores and expert load of a whole split, continuing an interrupted evaluation if any."""
    before = unfinished.load() if unfinished else None
    done, earlier_load = before or (None, None)
    latest: Scores | None = None

    def load_so_far() -> list[list[int]]:
        own = [layer.tolist() for layer in load]
        return own if earlier_load is None else _added(earlier_load, own)

    def on_batch(scores: Scores) -> None:
        nonlocal latest
        latest = scores
        if unfinished and unfinished.is_due():
            unfinished.save(scores, load_so_far())
        on_progress(_progress(scores, len(tokens)))

    with counting_load(model) as load:
        if earlier_load is not None and list(map(len, earlier_load)) != list(map(len, load)):
            raise CheckpointError(
                f"{unfinished and unfinished.path} belongs to a model with other experts; delete "
                "it to score from the beginning"
            )
        try:
            scores = score(
                model,
                tokens,
                window=setting.window,
                batch_size=setting.batch_size,
                bos_id=bos_id,
                done=done,
                on_batch=on_batch,
            )
        finally:
            if unfinished and latest is not None:
                unfinished.save(latest, load_so_far())
    return scores, load_so_far()


def _unfinished(folder: Path, setting: Setting) -> Unfinished | None:
    if setting.unfinished is None:
        return None
    text = hashlib.sha256(setting.text.encode()).hexdigest()
    own = {"text": text, "window": setting.window, "batch_size": setting.batch_size}
    return Unfinished(setting.unfinished, {**own, "files": manifest.read(folder)})


def _added(left: list[list[int]], right: list[list[int]]) -> list[list[int]]:
    return [
        [a + b for a, b in zip(*layers, strict=True)] for layers in zip(left, right, strict=True)
    ]


def _progress(scores: Scores, tokens: int) -> Progress:
    perplexity = perplexity_per_token(scores)
    error = perplexity * standard_error(scores) if len(scores.nll) > 1 else None
    return Progress(scores.total_tokens / tokens, perplexity, error)


def evaluate_in_new_process(
    folder: Path,
    setting: Setting,
    reference: Path | None = None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> Evaluation:
    """`evaluate_checkpoint` in a fresh interpreter, which shares only files with this one.

    Raises:
        BKCoreError: whatever was raised there.
        CheckpointError: if the process died.
    """
    try:
        found: Evaluation = call_in_new_process(
            _work, folder, setting, reference, on_message=on_progress
        )
        return found
    except ProcessDiedError as error:
        raise CheckpointError(
            f"the process that evaluated {folder} ended with exit code {error.exit_code}, perhaps "
            "out of memory; its output may say why"
        ) from None


def _work(
    send: Callable[[Progress], None], folder: Path, setting: Setting, reference: Path | None
) -> Evaluation:
    keep_freed_memory()
    transformers_logging.disable_progress_bar()  # the parent process shows the progress
    return evaluate_checkpoint(folder, setting, reference, send)


def _full_batches(tokens: Tensor, setting: Setting) -> list[Tensor]:
    """Batches of equal shape, spread over the text; a short text gives one smaller batch."""
    windows = tokens[: len(tokens) // setting.window * setting.window].view(-1, setting.window)
    if len(windows) < setting.batch_size:
        return [tokens[: setting.window][None]]
    batches = windows[: len(windows) // setting.batch_size * setting.batch_size]
    batches = batches.view(-1, setting.batch_size, setting.window)
    count = min(_SPEED_BATCHES, len(batches))
    return list(batches[torch.linspace(0, len(batches) - 1, count).long()])


def _time_in_alternation(
    reference: nn.Module, model: nn.Module, batches: list[Tensor]
) -> tuple[float, float]:
    """Tokens per second of `model`, and how many times faster it is than `reference`.

    The two take turns on the same batches, so that drifts in the machine's speed affect both.
    """
    seconds: list[float] = []
    ratios: list[float] = []
    with torch.inference_mode():
        for each in (reference, model):
            each(batches[0])
        for batch in batches:
            theirs = _seconds(reference, batch) if reference is not model else None
            own = _seconds(model, batch)
            seconds.append(own)
            ratios.append(1.0 if theirs is None else theirs / own)
    return batches[0].numel() / median(seconds), median(ratios)


def _seconds(model: nn.Module, batch: Tensor) -> float:
    start = time.perf_counter()
    model(batch)
    return time.perf_counter() - start
