"""A model's measurements as rows of tables and JSON files."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from bkcore.deprecated import moved_names
from bkcore.evaluation.evaluate import Evaluation
from bkcore.evaluation.perplexity import (
    Protocol,
    Scores,
    paired_change,
    perplexity_per_byte,
    perplexity_per_token,
    perplexity_per_word,
)
from bkcore.model import ResNetBKForCausalLM

__getattr__ = moved_names(__name__)


def row(mode: str, evaluation: Evaluation, reference: Evaluation) -> dict[str, Any]:
    """One row of the table, as written to the JSON file."""
    change = paired_change(reference.scores, evaluation.scores)
    return {
        "mode": mode,
        **perplexities(evaluation.scores, evaluation.protocol),
        "delta_pct": change.delta_pct,
        "ci_low_pct": change.low_pct,
        "ci_high_pct": change.high_pct,
        "kl_nats": evaluation.kl_nats,
        "kl_tokens": evaluation.kl_tokens,
        "bytes": evaluation.bytes,
        "size_ratio": reference.bytes / evaluation.bytes,
        "tokens_per_second": evaluation.tokens_per_second,
        "speedup": evaluation.speedup,
    }


def perplexities(scores: Scores, protocol: Protocol) -> dict[str, float]:
    """Perplexity per token, word and byte; infinite if float64 overflows."""
    return {
        "ppl_token": perplexity_per_token(scores),
        "ppl_word": perplexity_per_word(scores, protocol.words),
        "ppl_byte": perplexity_per_byte(scores, protocol.bytes),
    }


def load_summary(tokens: list[int]) -> dict[str, Any]:
    """How evenly the experts of a layer were used.

    Args:
        tokens: how many each expert served, at least one in total.

    Returns:
        `tokens`; `min_share` and `max_share`, the smallest and largest share of the tokens, 1 / E
        if the load is even; and `entropy` of the shares divided by its maximum log E, in [0, 1],
        with 1 for an even load.
    """
    shares = torch.tensor(tokens, dtype=torch.float64) / sum(tokens)
    entropy = -torch.xlogy(shares, shares).sum() / math.log(len(tokens))
    return {
        "tokens": tokens,
        "min_share": shares.min().item(),
        "max_share": shares.max().item(),
        "entropy": entropy.item(),
    }


def parameter_shares(folder: Path) -> dict[str, float]:
    """The number of parameters of a float checkpoint, and the shares of its head and experts."""
    model = ResNetBKForCausalLM.from_pretrained(folder)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    total = sum(sizes.values())
    experts = sum(size for name, size in sizes.items() if ".experts.experts." in name)
    return {
        "total": total,
        "head_share": model.embedding.weight.numel() / total,
        "expert_share": experts / total,
    }
