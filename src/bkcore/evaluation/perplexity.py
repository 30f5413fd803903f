r"""Perplexity with its error bars: scores per window, and paired comparisons of two models.

Let d_k be a quantity summed over window k, and n_k the number of tokens in it. The mean per token
is the ratio ``R = sum d_k / sum n_k``. The last window of a split is shorter, so the standard error
is the linearized one of a ratio estimator: with residuals ``e_k = d_k - R n_k`` over m windows,

    SE(R) = sqrt(m / (m - 1) * sum e_k^2) / sum n_k.

This treats windows as independent samples. Neighbouring windows of one article are not quite
independent, so the error may be somewhat larger than stated. `paired_change` takes the differences
between two models window by window, which removes what makes a window hard for both.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bkcore.errors import InputError, ShapeError
from bkcore.evaluation.logits import (
    LanguageModel,
    check_vocabulary,
    device_of,
    evaluating,
    finite_logits,
)
from bkcore.text import scored_windows


@dataclass(frozen=True, eq=False)
class Scores:
    """A model's scores on each window of a split.

    Attributes:
        nll: float64 of shape (windows,), the summed negative log likelihood in nats, finite.
        tokens: int64 of shape (windows,), how many tokens each sum is over, at least 1.
        seconds: how long the scoring took, including the model's forward passes.

    Raises:
        InputError: if a dtype, a shape or a value is not as above.
    """

    nll: Tensor
    tokens: Tensor
    seconds: float

    def __post_init__(self) -> None:
        if self.nll.dtype != torch.float64 or self.tokens.dtype != torch.int64:
            raise InputError(
                f"nll must be float64 and tokens int64, not {self.nll.dtype} and "
                f"{self.tokens.dtype}"
            )
        if self.nll.ndim != 1 or self.nll.shape != self.tokens.shape or len(self.nll) == 0:
            raise InputError("scores must have one nll and one token count for each window")
        if not bool(self.nll.isfinite().all()) or bool((self.tokens < 1).any()):
            raise InputError("scores must have a finite nll and at least one token in each window")

    @property
    def total_nll(self) -> float:
        """Summed negative log likelihood of the split, in nats."""
        return float(self.nll.sum())

    @property
    def total_tokens(self) -> int:
        """Tokens of the split."""
        return int(self.tokens.sum())

    def as_dict(self) -> dict[str, Any]:
        """Return the scores as plain JSON values; `from_dict` reads them back bit for bit."""
        return {
            "nll": self.nll.tolist(),
            "tokens": self.tokens.tolist(),
            "seconds": self.seconds,
        }

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> "Scores":
        """Read the result of `as_dict`.

        Raises:
            InputError: if an entry is missing or not as `as_dict` writes it.
        """
        try:
            return cls(
                nll=torch.tensor(content["nll"], dtype=torch.float64),
                tokens=torch.tensor(content["tokens"], dtype=torch.int64),
                seconds=float(content["seconds"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"these are not scores: {error}") from error


@dataclass(frozen=True)
class Change:
    """A change of token perplexity in percent, with its confidence interval; negative is better."""

    delta_pct: float
    low_pct: float
    high_pct: float


@dataclass(frozen=True)
class Protocol:
    """How a perplexity was measured; two can be compared only if their protocols agree.

    Attributes:
        tokenizer_hash: see `bkcore.text.tokenizer_hash`.
        split: name of the text that was scored.
        window: targets in a window; no token sees anything before its window.
        tokens: tokens scored.
        words: words of the split, see `bkcore.text.count_words`.
        bytes: bytes of the split in UTF-8.
        batch_size: windows in a batch.
        confidence: level of the intervals.
    """

    tokenizer_hash: str
    split: str
    window: int
    tokens: int
    words: int
    bytes: int
    batch_size: int
    confidence: float = 0.95

    @property
    def stride(self) -> int:
        """Distance between the starts of windows, which never overlap."""
        return self.window

    def as_dict(self) -> dict[str, Any]:
        """Return the protocol, including the stride, as plain JSON values."""
        return asdict(self) | {"stride": self.stride}


def score(
    model: LanguageModel,
    tokens: Tensor,
    *,
    window: int,
    batch_size: int,
    bos_id: int,
    done: Scores | None = None,
    on_batch: Callable[[Scores], None] | None = None,
) -> Scores:
    """Score every token of a split exactly once, in windows that do not overlap.

    A module is scored in evaluation mode on the device of its parameters; its mode is restored
    afterwards. The windows are those of `bkcore.text.scored_windows`. The logits of a
    `ResNetBKForCausalLM` are computed and used piece by piece, so windows may be long.

    Args:
        model: see `LanguageModel`.
        tokens: integer token ids of shape (tokens,), at least one.
        window: targets in a window, at least 1.
        batch_size: windows in a batch, at least 1; a shorter last window has its own batch.
        bos_id: the token before the first one.
        done: the scores from an interrupted call, as passed to `on_batch`. Its windows are not
            scored again, and the result is the same bit for bit.
        on_batch: called after every batch with the scores of all windows so far.

    Returns:
        The scores of each window, in the order of the split, on the CPU.

    Raises:
        InputError: if an argument is impossible, a token is outside the model's vocabulary, a logit
            is not finite, or `done` does not belong to the first batches of these tokens.
        ShapeError: if `tokens` is not one-dimensional, or the logits are not (B, N, V).
        DTypeError: if `tokens` is not of an integer dtype.
    """
    if batch_size < 1:
        raise InputError(f"batch_size must be at least 1, not {batch_size}")
    windows = list(scored_windows(tokens, window, bos_id))
    known = getattr(getattr(model, "config", None), "vocab_size", None)
    if known is not None:
        check_vocabulary(torch.cat([tokens, tokens.new_tensor([bos_id])]), known)
    device = device_of(model, tokens)
    counts = torch.tensor([len(targets) for _, targets in windows], dtype=torch.int64)
    _check_done(done, counts, batch_size)
    first = 0 if done is None else len(done.nll)
    nll = [] if done is None else [done.nll]
    start = time.perf_counter() - (0.0 if done is None else done.seconds)

    def so_far() -> Scores:
        found = torch.cat(nll)
        return Scores(found, counts[: len(found)], time.perf_counter() - start)

    with evaluating(model), torch.inference_mode():
        for inputs, targets in _batches(windows[first:], batch_size):
            pieces = finite_logits(model, inputs.to(device), first_window=first)
            nll.append(_token_nll(pieces, targets.to(device)).sum(dim=1).cpu())
            first += len(targets)
            if on_batch is not None:
                on_batch(so_far())
    return so_far()


def _check_done(done: Scores | None, counts: Tensor, batch_size: int) -> None:
    if done is None:
        return
    windows = len(done.nll)
    if windows > len(counts) or not torch.equal(done.tokens, counts[:windows]):
        raise InputError(
            f"done has {windows} windows with {done.total_tokens} tokens, which are not the first "
            f"of these {len(counts)} windows; continue with the same tokens and window, or start "
            "afresh"
        )
    full = len(counts) - (int(counts[-1]) < int(counts[0]))
    if windows < full and windows % batch_size:
        raise InputError(
            f"done has {windows} windows, which are not whole batches of {batch_size}; "
            "continue with the same batch size, or start afresh"
        )


def perplexity_per_token(scores: Scores) -> float:
    """exp of the mean negative log likelihood per token; infinite if float64 overflows."""
    return _exp(scores.total_nll / scores.total_tokens)


def perplexity_per_word(scores: Scores, words: int) -> float:
    """exp(total nll / words), comparable across tokenizers; infinite if float64 overflows.

    Args:
        scores: of a whole split.
        words: words of that split, see `bkcore.text.count_words`, at least 1.

    Raises:
        InputError: if `words` is below 1.
    """
    return _perplexity(scores, words, "words")


def perplexity_per_byte(scores: Scores, size: int) -> float:
    """exp(total nll / bytes); its base-2 logarithm is the number of bits per byte.

    Args:
        scores: of a whole split.
        size: bytes of that split in UTF-8, at least 1.

    Raises:
        InputError: if `size` is below 1.
    """
    return _perplexity(scores, size, "size")


def _perplexity(scores: Scores, units: int, name: str) -> float:
    if units < 1:
        raise InputError(f"{name} must be at least 1, not {units}")
    return _exp(scores.total_nll / units)


def standard_error(scores: Scores) -> float:
    """The standard error of the mean nll per token, in nats, from the spread of the windows.

    Raises:
        InputError: if there are fewer than two windows.
    """
    return _mean_per_token(scores.nll, scores.tokens)[1]


def paired_change(reference: Scores, scores: Scores, confidence: float = 0.95) -> Change:
    """Compare two models on the same windows: the change of token perplexity, in percent.

    The mean difference of nll per token and its standard error are defined at the top of this
    module. The interval uses Student's quantile, with one degree of freedom fewer than windows.
    Windows are treated as independent. Identical scores give exactly zero.

    Args:
        reference: scores of the model to compare with.
        scores: scores of the other model on the same split and windows. The lengths of the windows
            are checked; whether their tokens are the same cannot be.
        confidence: level of the interval, in (0, 1).

    Returns:
        ``100 (ppl / ppl_reference - 1)`` and the ends of its interval.

    Raises:
        InputError: if the windows differ, there are fewer than two, or `confidence` is outside
            (0, 1).
    """
    if not 0 < confidence < 1:
        raise InputError(f"confidence must be between 0 and 1, not {confidence}")
    if not torch.equal(reference.tokens, scores.tokens):
        raise InputError(
            f"the two scores are not of the same windows: {len(reference.tokens)} windows with "
            f"{reference.total_tokens} tokens, and {len(scores.tokens)} with "
            f"{scores.total_tokens}; score both models on the same split with the same window"
        )
    mean, error = _mean_per_token(scores.nll - reference.nll, scores.tokens)
    margin = _student_quantile((1 + confidence) / 2, len(scores.tokens) - 1) * error
    logs = torch.tensor([mean, mean - margin, mean + margin], dtype=torch.float64)
    return Change(*(100 * logs.expm1()).tolist())


def kl_divergence(
    reference_model: LanguageModel, model: LanguageModel, batches: Iterable[Tensor]
) -> float:
    """Measure how far a model's next-token distributions are from a reference's.

    Args:
        reference_model: predicts p, such as the float model; see `LanguageModel`.
        model: predicts q over the same vocabulary, such as the quantized model.
        batches: int64 token ids of shape (B, N) each.

    Returns:
        The mean over all positions of KL(p || q) in nats, computed in float64. Two models with
        identical logits give exactly zero.

    Raises:
        InputError: if there is no batch, or a logit is not finite.
        ShapeError: if logits are not (B, N, V), or differ in shape between the models.
    """
    total, positions, windows = 0.0, 0, 0
    with ExitStack() as stack:
        for each in (reference_model, model):
            stack.enter_context(evaluating(each))
        stack.enter_context(torch.inference_mode())
        for inputs in batches:
            pieces = [
                finite_logits(each, inputs.to(device_of(each, inputs)), first_window=windows)
                for each in (reference_model, model)
            ]
            total += _summed_kl(*pieces)
            positions += inputs.numel()
            windows += len(inputs)
    if positions == 0:
        raise InputError("kl_divergence needs at least one batch to compare the models on")
    return total / positions


def _batches(
    windows: list[tuple[Tensor, Tensor]], batch_size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Stack full windows in batches; a shorter last window is a batch of its own."""
    if not windows:
        return
    length = len(windows[0][0])
    full = len(windows) - (len(windows[-1][0]) < length)
    for start in range(0, full, batch_size):
        inputs, targets = zip(*windows[start : min(start + batch_size, full)], strict=True)
        yield torch.stack(inputs), torch.stack(targets)
    for tail_inputs, tail_targets in windows[full:]:
        yield tail_inputs[None], tail_targets[None]


def _token_nll(pieces: Iterable[Tensor], targets: Tensor) -> Tensor:
    """The negative log likelihood of targets (B, N) in float64, computed piece by piece."""
    nll: list[Tensor] = []
    rest = targets.flatten()
    for logits in pieces:
        target, rest = rest[: len(logits)], rest[len(logits) :]
        check_vocabulary(target, logits.shape[-1])
        nll.append(F.cross_entropy(logits.float(), target, reduction="none").double())
    return torch.cat(nll).view(targets.shape)


def _summed_kl(reference: Iterable[Tensor], other: Iterable[Tensor]) -> float:
    total = 0.0
    for p, q in zip(reference, other, strict=True):
        if p.shape != q.shape:
            raise ShapeError(
                f"the models returned logits of different shapes, {tuple(p.shape)} and "
                f"{tuple(q.shape)}, for the same tokens; they must have the same vocabulary"
            )
        log_p, log_q = p.double().log_softmax(-1), q.to(p.device).double().log_softmax(-1)
        total += float(F.kl_div(log_q, log_p, reduction="sum", log_target=True))
    return total


def _mean_per_token(sums: Tensor, tokens: Tensor) -> tuple[float, float]:
    """The ratio of totals, and its linearized standard error over the windows."""
    windows = len(tokens)
    if windows < 2:
        raise InputError(
            "one window tells nothing about the spread; give more text or a shorter window"
        )
    total = tokens.sum()
    mean = sums.sum() / total
    residuals = sums - mean * tokens
    error = (windows / (windows - 1) * residuals.square().sum()).sqrt() / total
    return float(mean), float(error)


def _student_quantile(probability: float, freedom: int) -> float:
    """Student's t quantile, by Fisher's expansion around the normal one.

    At the 97.5 % point it is 3 % too low with two degrees of freedom, and 0.1 % with five.
    """
    z = NormalDist().inv_cdf(probability)
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / freedom + second / freedom**2 + third / freedom**3


def _exp(value: float) -> float:
    return float(torch.tensor(value, dtype=torch.float64).exp())
