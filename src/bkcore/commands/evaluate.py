"""`bkcore evaluate`: the perplexity of a checkpoint, with its protocol."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import rich.console
import typer
from rich import box
from rich.table import Table

from bkcore.commands.files import Files
from bkcore.commands.options import DataOption, JsonOption
from bkcore.commands.running import keeping, start_work, use_free_cores
from bkcore.display.console import Console, bits_per_byte, number, warn
from bkcore.display.progress import Plan
from bkcore.outputs import prepare_folder

if TYPE_CHECKING:
    from bkcore.evaluation.evaluate import Evaluation, Setting


def evaluate(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint folder.")],
    data: DataOption = None,
    reference: Annotated[
        Path | None, typer.Option(help="Checkpoint to compare perplexity and speed against.")
    ] = None,
    window: Annotated[
        int | None, typer.Option(min=1, help="Tokens per window; default: as in its training.")
    ] = None,
    output: Annotated[
        Path, typer.Option(help="Folder that keeps the scores of an interrupted evaluation.")
    ] = Path("runs/evaluate"),
    json_file: JsonOption = None,
) -> None:
    """Measure the perplexity of a checkpoint on the validation split.

    If it is interrupted, the same command continues where it stopped.
    """
    console, files = Console(), Files(json_file)
    files.prepare({"--output": output}, [checkpoint, reference], data)
    start_work()
    use_free_cores()

    def finish(result: dict[str, Any]) -> None:
        def show() -> None:
            console.print(summary(result))
            if result["expert_load"]:
                console.print(load_table(result["expert_load"]))
            if result["warning"] is not None:
                warn(console, result["warning"])

        files.publish(show, result)

    with keeping(f"{output} keeps what was scored; the same command continues from there"):
        run_evaluation(checkpoint, data, reference, console, window, output, finish)


def run_evaluation(
    checkpoint: Path,
    data: str | Path | None,
    reference: Path | None,
    console: rich.console.Console,
    window: int | None = None,
    output: Path | None = None,
    publish: Callable[[dict[str, Any]], None] = lambda result: None,
) -> dict[str, Any]:
    """Evaluate a checkpoint on the validation split, against itself or a reference.

    Args:
        checkpoint: folder with a model and its tokenizer.
        data: as in `bkcore.text.load_split`; None takes the embedded corpus.
        reference: checkpoint to compare perplexity and speed against.
        console: for the progress bar.
        window: tokens per window; None takes that of the model's training.
        output: folder for the scores so far, from which the next call continues if this one is
            interrupted; None keeps nothing.
        publish: called with the result. The scores are kept until it returns.

    Returns:
        The row of the checkpoint as in the demo's report, `expert_load` (see `load_summary`), the
        `protocol`, and `warning`, set if the model was trained on another text, else None.

    Raises:
        CheckpointError: if a checkpoint cannot be loaded.
        DataError: if the validation split is missing, unreadable or too small.
        InputError: if `output` cannot be written, the text is a single window, or the reference has
            another tokenizer; raised before anything is scored.
    """
    import torch

    from bkcore.evaluation.checkpoints import check_tokenizers, load_checkpoint
    from bkcore.evaluation.evaluate import Setting, batch_of
    from bkcore.evaluation.perplexity import standard_error
    from bkcore.evaluation.rows import load_summary, row
    from bkcore.text import load_split, warning_of_other_text

    if output is not None:
        prepare_folder(output)
    corpus, text = load_split(data, "valid")
    model, tokenizer = load_checkpoint(checkpoint)
    if reference is not None:
        check_tokenizers(tokenizer, load_checkpoint(reference)[1], checkpoint, reference)
    warning = warning_of_other_text(model.config.training_text, data, corpus, "valid", text)
    if warning is not None:
        warn(console, warning)
    window = model.config.n_seq if window is None else window
    threads = torch.get_num_threads()
    setting = Setting(text, "valid", window, batch_of(window), threads, output)
    names = ["checkpoint"] if reference is None else ["reference", "checkpoint"]
    with Plan(dict.fromkeys(names, 1.0), console) as plan:
        base = None
        if reference is not None:
            base = _evaluate(plan, "reference", reference, setting, None)
        found = _evaluate(plan, "checkpoint", checkpoint, setting, reference)
    result = {
        **row(checkpoint.name, found, base or found),
        "standard_error_nats": standard_error(found.scores),
        "expert_load": [load_summary(layer) for layer in found.expert_load],
        "protocol": {**found.protocol.as_dict(), "corpus": corpus},
        "warning": warning,
    }
    publish(result)
    for each in (base, found):
        if each is not None and each.kept is not None:
            each.kept.unlink(missing_ok=True)
    return result


def _evaluate(
    plan: Plan, name: str, checkpoint: Path, setting: Setting, reference: Path | None
) -> Evaluation:
    from bkcore.evaluation.evaluate import evaluate_in_new_process

    with plan.stage(name) as advance:
        return evaluate_in_new_process(
            checkpoint,
            setting,
            reference,
            lambda progress: advance(progress.fraction, progress),
        )


def summary(result: dict[str, Any]) -> Table:
    """The result of `run_evaluation` as a table, without the load of the experts."""
    protocol = result["protocol"]
    table = Table(
        title=f"{result['mode']} on {protocol['corpus']}, {protocol['split']}",
        box=None,
        show_header=False,
    )
    table.add_column()
    table.add_column(justify="right")
    table.add_row("perplexity per word", number(result["ppl_word"], ".2f"))
    table.add_row("perplexity per token", number(result["ppl_token"], ".3f"))
    table.add_row("perplexity per byte", number(result["ppl_byte"], ".4f"))
    table.add_row("bits per byte", bits_per_byte(result["ppl_byte"]))
    table.add_row("standard error, nats per token", f"{result['standard_error_nats']:.4f}")
    if result["kl_nats"] is not None:
        low, high = (number(result[f"ci_{end}_pct"], "+.2f") for end in ("low", "high"))
        table.add_row("change from the reference, %", number(result["delta_pct"], "+.2f"))
        table.add_row("its 95 % interval, %", f"{low} to {high}")
        table.add_row("KL divergence from it, nats per token", number(result["kl_nats"], ".5f"))
        table.add_row("times smaller", f"{result['size_ratio']:.2f}")
        table.add_row("times as fast", f"{result['speedup']:.2f}")
    table.add_row("size, MB", f"{result['bytes'] / 1e6:.2f}")
    table.add_row("tokens per second", f"{result['tokens_per_second']:,.0f}")
    table.add_row("tokens scored", f"{protocol['tokens']:,}")
    table.add_row("tokens per window", f"{protocol['window']:,}")
    return table


def load_table(expert_load: list[dict[str, Any]]) -> Table:
    """The load of the experts, one row per layer; shares are multiples of an even share."""
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
