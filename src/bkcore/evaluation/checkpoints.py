"""Judging a saved checkpoint: what is measured is what was loaded, in a process of its own."""

from __future__ import annotations

import multiprocessing
import pickle
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from bkcore.errors import BKCoreError, CheckpointError
from bkcore.evaluation.perplexity import Protocol, Scores, score
from bkcore.memory import keep_freed_memory
from bkcore.model import ResNetBKForCausalLM
from bkcore.model.checkpoint import model_bytes
from bkcore.model.moe import counting_load
from bkcore.text import count_words, encode, tokenizer_hash

_SPEED_BATCHES = 9


@dataclass(frozen=True)
class Setting:
    """How checkpoints are judged.

    Attributes:
        text: the split that is scored.
        split: its name.
        window: tokens a window.
        batch_size: windows a batch.
        threads: CPU threads.
    """

    text: str
    split: str
    window: int
    batch_size: int
    threads: int


@dataclass(frozen=True)
class Evaluation:
    """What was measured on one checkpoint.

    Attributes:
        scores: negative log likelihoods, a window each.
        protocol: how they were taken.
        bytes: size of the model's files on disk.
        tokens_per_second: of forward passes over full batches, median.
        speedup: how many times faster than the reference, the median of paired batches; 1 if the
            checkpoint is the reference.
        expert_load: tokens of the split that each expert served, a list for each layer that
            routes.
    """

    scores: Scores
    protocol: Protocol
    bytes: int
    tokens_per_second: float
    speedup: float
    expert_load: list[list[int]]


def evaluate_checkpoint(
    folder: Path,
    setting: Setting,
    reference: Path | None = None,
    on_progress: Callable[[float], None] = lambda fraction: None,
) -> Evaluation:
    """Load a checkpoint with its tokenizer, score a text, and time it against a reference.

    Args:
        folder: the checkpoint; its tokenizer is saved beside it.
        setting: the text and how it is scored.
        reference: checkpoint to time against, in alternation; itself if None.
        on_progress: called with the fraction done.

    Raises:
        CheckpointError: if a checkpoint or its tokenizer cannot be loaded.
        InputError: if the model's logits are not finite.
    """
    torch.set_num_threads(setting.threads)
    model, tokenizer = load_checkpoint(folder)
    tokens = encode(tokenizer, setting.text)
    done = 0

    def on_batch(scored: int) -> None:
        nonlocal done
        done += scored
        on_progress(done / len(tokens))

    with counting_load(model) as load:
        scores = score(
            model,
            tokens,
            window=setting.window,
            batch_size=setting.batch_size,
            bos_id=tokenizer.bos_token_id,
            on_batch=on_batch,
        )
    rival = model if reference is None else load_checkpoint(reference)[0]
    rate, speedup = _time_in_alternation(rival, model, _full_batches(tokens, setting))
    protocol = Protocol(
        tokenizer_hash(tokenizer),
        setting.split,
        setting.window,
        scores.total_tokens,
        count_words(setting.text),
        setting.batch_size,
    )
    expert_load = [layer.tolist() for layer in load]
    return Evaluation(scores, protocol, model_bytes(folder), rate, speedup, expert_load)


def load_checkpoint(folder: Path) -> tuple[ResNetBKForCausalLM, PreTrainedTokenizerFast]:
    """Load a model and the tokenizer beside it.

    Weights that were saved in float16 or bfloat16 are widened: everything computes in float32.

    Raises:
        CheckpointError: if either is missing or damaged.
    """
    model = ResNetBKForCausalLM.from_pretrained(folder).eval()
    if model.dtype in (torch.float16, torch.bfloat16):
        model.float()
    if not (folder / "tokenizer.json").is_file():
        raise CheckpointError(
            f"{folder} holds no tokenizer.json; save the tokenizer into the model's folder: "
            "tokenizer.save_pretrained(folder)"
        )
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot load the tokenizer in {folder}: {error}") from error
    return model, tokenizer


def evaluate_in_new_process(
    folder: Path,
    setting: Setting,
    reference: Path | None = None,
    on_progress: Callable[[float], None] = lambda fraction: None,
) -> Evaluation:
    """`evaluate_checkpoint` in a fresh interpreter, which shares nothing but the files.

    Raises:
        BKCoreError: whatever went wrong there.
        CheckpointError: if the process died.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(sender, folder, setting, reference), daemon=True)
    process.start()
    sender.close()
    try:
        while True:
            message: Any = pickle.loads(receiver.recv_bytes())
            if isinstance(message, BKCoreError):
                raise message
            if isinstance(message, Evaluation):
                return message
            on_progress(message)
    except EOFError:
        process.join()
        raise CheckpointError(
            f"the process that evaluated {folder} ended with exit code {process.exitcode}; "
            "its output says why (out of memory?)"
        ) from None
    finally:
        receiver.close()
        process.join()


def _work(sender: Connection, folder: Path, setting: Setting, reference: Path | None) -> None:
    keep_freed_memory()
    transformers_logging.disable_progress_bar()  # the parent process shows the progress

    def send(message: float | Evaluation | BKCoreError) -> None:
        # By value: torch would have Connection.send share tensors through a server in this
        # process, which ends before they are read.
        sender.send_bytes(pickle.dumps(message))

    try:
        send(evaluate_checkpoint(folder, setting, reference, send))
    except BKCoreError as error:
        send(error)


def _full_batches(tokens: Tensor, setting: Setting) -> list[Tensor]:
    """Batches of one shape, spread over the text; a short text gives one batch of what it has."""
    windows = tokens[: len(tokens) // setting.window * setting.window].view(-1, setting.window)
    if len(windows) < setting.batch_size:
        return [tokens[: setting.window][None]]
    batches = windows[: len(windows) // setting.batch_size * setting.batch_size]
    return list(batches.view(-1, setting.batch_size, setting.window)[:_SPEED_BATCHES])


def _time_in_alternation(
    reference: nn.Module, model: nn.Module, batches: list[Tensor]
) -> tuple[float, float]:
    """Tokens per second of `model`, and how many times faster it is than `reference`.

    The two take turns on the same batches, so that a machine whose speed drifts slows both.
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
