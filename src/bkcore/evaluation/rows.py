"""What is measured of a model as the rows of tables and JSON files."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from bkcore.evaluation.judging import Evaluation
from bkcore.evaluation.perplexity import (
    Protocol,
    Scores,
    paired_change,
    perplexity_per_byte,
    perplexity_per_token,
    perplexity_per_word,
)
from bkcore.model import ResNetBKForCausalLM


def row(mode: str, evaluation: Evaluation, reference: Evaluation) -> dict[str, Any]:
    """One line of the table, as it stands in the JSON file."""
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
    """Perplexity per token, word and byte; infinite where float64 overflows."""
    return {
        "ppl_token": perplexity_per_token(scores),
        "ppl_word": perplexity_per_word(scores, protocol.words),
        "ppl_byte": perplexity_per_byte(scores, protocol.bytes),
    }


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


def parameter_shares(folder: Path) -> dict[str, float]:
    """Number of parameters of a float checkpoint, and the shares of its head and its experts."""
    model = ResNetBKForCausalLM.from_pretrained(folder)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    total = sum(sizes.values())
    experts = sum(size for name, size in sizes.items() if ".experts.experts." in name)
    return {
        "total": total,
        "head_share": model.embedding.weight.numel() / total,
        "expert_share": experts / total,
    }


def average_bits(receipt: dict[str, Any]) -> float:
    """Bits of a weight that the mode names, scales included, on average over all of them."""
    weights = receipt["weights"]
    count = sum(rows * columns for rows, columns in (entry["shape"] for entry in weights))
    return float(8 * sum(entry["bytes"] for entry in weights) / count)
