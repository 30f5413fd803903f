"""The perplexity of a checkpoint, with its protocol."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from transformers.utils import logging as transformers_logging

from bkcore.evaluation.checkpoints import (
    Evaluation,
    Setting,
    evaluate_in_new_process,
    load_checkpoint,
)
from bkcore.evaluation.perplexity import standard_error
from bkcore.report.demo import row
from bkcore.report.files import prepare_folder
from bkcore.report.progress import Plan
from bkcore.text import load_corpus

_TOKENS_A_BATCH = 4096


def run_evaluation(
    checkpoint: Path,
    data: str | Path | None,
    reference: Path | None,
    console: Console,
    window: int | None = None,
    output: Path | None = None,
) -> dict[str, Any]:
    """Judge a checkpoint on the validation split, against itself or a reference.

    Args:
        checkpoint: folder with a model and its tokenizer.
        data: as in `bkcore.text.load_corpus`; None takes the embedded corpus.
        reference: checkpoint whose perplexity and speed are compared with.
        console: where progress is drawn.
        window: tokens a window; None takes that of the model's training.
        output: folder that keeps what was scored when this is interrupted, for the next call to
            continue; None keeps nothing.

    Returns:
        The row of the checkpoint as in the demo's report, `expert_load` (see `load_summary`), and
        the `protocol`.
    """
    transformers_logging.disable_progress_bar()
    if output is not None:
        prepare_folder(output)
    corpus = load_corpus(data)
    window = load_checkpoint(checkpoint)[0].config.n_seq if window is None else window
    batch_size = max(1, _TOKENS_A_BATCH // window)
    setting = Setting(corpus.valid, "valid", window, batch_size, torch.get_num_threads(), output)
    names = ["checkpoint"] if reference is None else ["reference", "checkpoint"]
    with Plan(dict.fromkeys(names, 1.0), console) as plan:
        base = None
        if reference is not None:
            base = _judge(plan, "reference", reference, setting, None)
        found = _judge(plan, "checkpoint", checkpoint, setting, reference)
    return {
        **row(checkpoint.name, found, base or found),
        "standard_error_nats": standard_error(found.scores),
        "expert_load": [load_summary(layer) for layer in found.expert_load],
        "protocol": {**found.protocol.as_dict(), "corpus": corpus.name},
    }


def _judge(
    plan: Plan, name: str, checkpoint: Path, setting: Setting, reference: Path | None
) -> Evaluation:
    with plan.stage(name) as advance:
        return evaluate_in_new_process(
            checkpoint,
            setting,
            reference,
            lambda progress: advance(progress.fraction, progress),
        )


def load_summary(tokens: list[int]) -> dict[str, Any]:
    """How evenly the experts of a layer were used.

    Args:
        tokens: served by each expert, at least one in all.

    Returns:
        `tokens`; `min_share` and `max_share` of all of them, which an even load makes 1 / E; and
        `entropy` of the shares over its largest value log E, in [0, 1]: 1 is even.
    """
    shares = torch.tensor(tokens, dtype=torch.float64) / sum(tokens)
    entropy = -torch.xlogy(shares, shares).sum() / math.log(len(tokens))
    return {
        "tokens": tokens,
        "min_share": shares.min().item(),
        "max_share": shares.max().item(),
        "entropy": entropy.item(),
    }


def summary(result: dict[str, Any]) -> Table:
    """What `run_evaluation` returned, a number a line, without the load of the experts."""
    protocol = result["protocol"]
    table = Table(
        title=f"{result['mode']} on {protocol['corpus']}, {protocol['split']}",
        box=None,
        show_header=False,
    )
    table.add_column()
    table.add_column(justify="right")
    table.add_row("perplexity per word", f"{result['ppl_word']:.2f}")
    table.add_row("perplexity per token", f"{result['ppl_token']:.3f}")
    table.add_row("perplexity per byte", f"{result['ppl_byte']:.4f}")
    table.add_row("standard error, nats per token", f"{result['standard_error_nats']:.4f}")
    if result["kl_nats"] is not None:
        low, high = result["ci_low_pct"], result["ci_high_pct"]
        table.add_row("change from the reference, %", f"{result['delta_pct']:+.2f}")
        table.add_row("its 95 % interval, %", f"{low:+.2f} to {high:+.2f}")
        table.add_row("KL divergence from it, nats per token", f"{result['kl_nats']:.5f}")
        table.add_row("times smaller", f"{result['size_ratio']:.2f}")
        table.add_row("times as fast", f"{result['speedup']:.2f}")
    table.add_row("size, MB", f"{result['bytes'] / 1e6:.2f}")
    table.add_row("tokens per second", f"{result['tokens_per_second']:,.0f}")
    table.add_row("tokens scored", f"{protocol['tokens']:,}")
    table.add_row("tokens a window", f"{protocol['window']:,}")
    return table


def load_table(expert_load: list[dict[str, Any]]) -> Table:
    """The load of the experts, a row for each layer; shares are times an even share."""
    table = Table(title="load of the experts, 1 is even", box=box.SIMPLE_HEAD, show_edge=False)
    for heading in ("layer", "experts", "tokens served", "least", "most", "entropy"):
        table.add_column(heading, justify="right")
    for index, layer in enumerate(expert_load):
        experts = len(layer["tokens"])
        table.add_row(
            str(index),
            str(experts),
            f"{sum(layer['tokens']):,}",
            f"{layer['min_share'] * experts:.2f}",
            f"{layer['max_share'] * experts:.2f}",
            f"{layer['entropy']:.3f}",
        )
    return table
