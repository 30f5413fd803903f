"""The comparison: do the requested runs, then report all finished ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from bkcore.arguments import starting_with
from bkcore.comparison import language, synthetic
from bkcore.comparison.contestants import CONVOLUTION
from bkcore.comparison.language import LanguageComparison
from bkcore.comparison.runs import Run, finished
from bkcore.comparison.settings import LanguageSettings, SyntheticSettings
from bkcore.display.console import say
from bkcore.display.progress import Plan
from bkcore.errors import InputError
from bkcore.evaluation.perplexity import Scores, paired_change, perplexity_per_byte
from bkcore.outputs import prepare_folder
from bkcore.text import load_corpus


@dataclass(frozen=True)
class Comparison:
    """Both parts of the comparison.

    Attributes:
        language, synthetic: the settings of each.
    """

    language: LanguageSettings
    synthetic: SyntheticSettings

    def runs(self, data: str | Path | None, seed: int | None) -> list[Run]:
        """All runs, with the planned seeds or with another one."""
        seeds = None if seed is None else (seed,)
        return [
            *LanguageComparison(load_corpus(data), self.language).runs(seeds),
            *synthetic.runs(self.synthetic, *([] if seeds is None else [seeds])),
        ]


def run_comparison(
    comparison: Comparison,
    data: str | Path | None,
    output: Path,
    console: Console,
    only: str = "",
    seed: int | None = None,
) -> dict[str, Any]:
    """Do the runs whose names start with `only`, and report all finished ones below `output`.

    Args:
        comparison: the settings.
        data: as in `bkcore.text.load_corpus`; None takes the embedded corpus.
        output: folder of the runs; each is in `group/contestant/seedN`.
        console: for the progress bar.
        only: how the names of the runs to do start.
        seed: used instead of the planned seeds.

    Returns:
        `protocol`; `language` and `synthetic`, one row per finished run; and `unfinished`, the
        names of the planned runs that are not finished.

    Raises:
        DataError: if the text is missing, unreadable or too small; raised before any training.
        InputError: if no run has such a name, or a folder was begun with other settings; raised
            before any training.
    """
    planned = comparison.runs(data, seed)
    names = starting_with(only, [run.name for run in planned], "run")
    chosen = [run for run in planned if run.name in names]
    for run in chosen:
        run.check(output)
        run.check_together(output)
        prepare_folder(output / run.name)
    report(output, planned)  # refuses incomparable finished runs now
    with Plan({run.name: run.weight for run in chosen}, console) as plan:
        for run in chosen:
            with plan.stage(run.name) as advance:
                if not run.finish(output, advance):
                    say(console, f"another process is doing {run.name}")
    return report(output, planned)


def report(output: Path, planned: Sequence[Run]) -> dict[str, Any]:
    """The finished runs as rows, and what they have in common as the protocol."""
    of_language = finished(output, language.GROUP)
    of_synthetic = finished(output, synthetic.GROUP)
    return {
        "protocol": {
            "language": _common_protocol(of_language, language.GROUP),
            "synthetic": _common_protocol(of_synthetic, synthetic.GROUP),
            "active_parameters": "those that serve one token: experts that are not chosen are "
            "left out, a tied embedding counts once; equal within 3 %",
            "change": "token perplexity against the convolution-only ablation, of the same seed "
            "where that has been run, else of seed 0, with its 95 % interval over windows",
            "seconds": "of all training steps; tokens_per_second is by the median step",
            "distance": "tokens from where the answer was written to the last one seen",
        },
        "language": [_compared(result, of_language) for result in of_language],
        "synthetic": [result["row"] for result in of_synthetic],
        "unfinished": [
            run.name for run in planned if not (output / run.name / "result.json").is_file()
        ],
    }


def _common_protocol(results: Sequence[dict[str, Any]], group: str) -> dict[str, Any] | None:
    if not results:
        return None
    protocol: dict[str, Any] = results[0]["protocol"]
    if any(result["protocol"] != protocol for result in results):
        raise InputError(
            f"the finished runs of {group} have different protocols and cannot be compared; "
            "name another --output for one of them"
        )
    return protocol


def _compared(result: dict[str, Any], results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The row of a language run, with its perplexity per byte and its change from the ablation."""
    scores = Scores.from_dict(result["scores"])
    size = result["protocol"]["evaluation"]["bytes"]
    row = {**result["row"], "ppl_byte": perplexity_per_byte(scores, size)}
    ablations = {
        other["row"]["seed"]: other
        for other in results
        if other["row"]["contestant"] == CONVOLUTION.name
    }
    ablation = ablations.get(row["seed"], ablations.get(0))
    if ablation is None:
        return row
    change = paired_change(Scores.from_dict(ablation["scores"]), scores)
    return {
        **row,
        "change_pct": change.delta_pct,
        "ci_low_pct": change.low_pct,
        "ci_high_pct": change.high_pct,
        "change_from_seed": ablation["row"]["seed"],
    }
