"""The perplexity of a checkpoint, with its protocol."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers.utils import logging as transformers_logging

from bkcore.evaluation.checkpoints import Setting, evaluate_in_new_process
from bkcore.evaluation.perplexity import standard_error
from bkcore.report.demo import DemoSettings, row
from bkcore.report.progress import Plan
from bkcore.text import load_corpus


def run_evaluation(
    checkpoint: Path, data: Path | None, reference: Path | None, console: Console
) -> dict[str, Any]:
    """Judge a checkpoint on the validation split, against itself or a reference.

    Args:
        checkpoint: folder with a model and its tokenizer.
        data: folder with train.txt and valid.txt; None takes the embedded corpus.
        reference: checkpoint whose perplexity and speed are compared with.
        console: where progress is drawn.

    Returns:
        The row of the checkpoint as in the demo's report, and the `protocol`.
    """
    transformers_logging.disable_progress_bar()
    corpus = load_corpus(data)
    settings = DemoSettings()
    setting = Setting(
        corpus.valid, "valid", settings.window, settings.batch_size, torch.get_num_threads()
    )
    names = ["checkpoint"] if reference is None else ["reference", "checkpoint"]
    with Plan(dict.fromkeys(names, 1.0), console) as plan:
        base = None
        if reference is not None:
            with plan.stage("reference") as advance:
                base = evaluate_in_new_process(reference, setting, None, advance)
        with plan.stage("checkpoint") as advance:
            found = evaluate_in_new_process(checkpoint, setting, reference, advance)
    return {
        **row(checkpoint.name, found, base or found),
        "standard_error_nats": standard_error(found.scores),
        "protocol": {**found.protocol.as_dict(), "corpus": corpus.name},
    }
