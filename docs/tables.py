"""The tables of measurements on the pages, made from `docs/data`, so that no figure is typed twice.

This command writes them again, between `<!-- table: NAME -->` and `<!-- end of table -->`:

    make tables

A file in `docs/data` holds what a command wrote with `--json`, or what a block of code printed
(`docs.printed`). Files with `"transcribed": true` were copied from older pages, with as many digits
as those had. A new run of their `command` replaces them.
"""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

from bkcore.bench.result import Result, markdown_table
from docs.cells import change, code, duration, markdown, shown, times
from docs.pages import ROOT, pages
from docs.printed import core_bounds, core_levels, core_sizes

Rows = list[list[str]]
MARKED = re.compile(r"(?<=<!-- table: )(\S+) -->\n(.*?)(?=<!-- end of table -->)", re.DOTALL)


def data(name: str) -> Any:
    return json.loads((ROOT / "docs/data" / f"{name}.json").read_text())


def with_tables(text: str) -> str:
    """The text of a page, with every marked table generated again."""
    return MARKED.sub(lambda found: f"{found[1]} -->\n\n{TABLES[found[1]]()}\n", text)


def plain(name: str) -> str:
    """A table of runs that were not kept."""
    table = data(name)
    return markdown(table["columns"], table["rows"])


def kernels() -> str:
    fields = ("name", "threads", "seconds", "baseline_seconds", "baseline", "target")
    return markdown_table(
        Result(shape=tuple(row["shape"]), **{field: row[field] for field in fields})
        for row in data("kernels")["results"]
    )


def language() -> str:
    header = ("model", "seed", "per token", "per word", "change, %", "95 % interval")
    return markdown(
        (*header, "active, M", "total, M", "tokens a second"),
        [
            [
                f"`{row['contestant']}`",
                str(row["seed"]),
                f"{row['ppl_token']:.2f}",
                f"{row['ppl_word']:.1f}",
                change(row, "change_pct")[0],
                change(row, "change_pct", 1)[1],
                f"{row['active_parameters'] / 1e6:.3f}",
                f"{row['total_parameters'] / 1e6:.3f}",
                f"{row['tokens_per_second']:,.0f}",
            ]
            for row in data("comparison")["language"]
        ],
    )


def synthetic() -> str:
    rows = data("comparison")["synthetic"]
    buckets = sorted(
        {(each["from"], each["to"]) for row in rows for each in row["accuracy_by_distance"]}
    )
    cells = []
    for row in rows:
        found = {each["from"]: each["accuracy"] for each in row["accuracy_by_distance"]}
        cells.append(
            [
                row["task"],
                f"`{row['contestant']}`",
                f"{100 * row['chance']:.1f}",
                f"{100 * row['accuracy']:.1f}",
                *(shown(found.get(low), ".1f", 100) for low, _ in buckets),
                f"{1e3 * row['seconds_per_step']:.0f}",
            ]
        )
    distances = [f"{low} to {high - 1}" for low, high in buckets]
    return markdown(("task", "model", "chance", "all", *distances, "ms a step"), cells, left=2)


THREADS = 2
"""Threads of the comparisons that do not name them: all cores of the machine."""


def inference(wanted: str, threads: int | None = None) -> list[dict[str, Any]]:
    """The rows of `bkcore bench inference` whose names begin with `wanted`; None: any threads."""
    return [
        row
        for row in data("inference")["results"]
        if row["name"].startswith(wanted) and threads in (None, row["threads"])
    ]


def speed(rows: Iterable[dict[str, Any]]) -> dict[tuple[str, int], float]:
    """Ratios by name and threads."""
    return {(row["name"], row["threads"]): row["ratio"] for row in rows}


def widths() -> str:
    kinds = [(kind, mode) for kind in ("prefill", "decode") for mode in ("INT8", "INT4")]
    ratios = speed(inference("prefill") + inference("decode"))
    sizes = {int(name.split()[1]) for name, _ in ratios if " at " not in name}
    return markdown(
        ("width", "threads", *(f"{kind}, {mode}" for kind, mode in kinds)),
        [
            [
                f"{width:,}",
                str(threads),
                *(times(ratios[f"{kind} {width} {mode}", threads]) for kind, mode in kinds),
            ]
            for width in sorted(sizes)
            for threads in (1, 2)
        ],
        left=0,
    )


def loops() -> str:
    """Microseconds a token, by the runtime alone and by each loop of the model."""
    kinds = ("stream", "generate")
    found: dict[str, dict[str, float]] = {}
    for row in data("loops")["results"]:
        loop, mode = row["name"].split()
        each = 1e6 / row["shape"][1]
        cells = found.setdefault(mode, {"runtime": each * row["baseline_seconds"]})
        cells[loop.removeprefix("model.")] = each * row["seconds"]
    return markdown(
        ("format", "`bkcore_runtime`", *(f"`model.{kind}`" for kind in kinds)),
        [
            [mode, *(f"{cells[name]:,.0f}" for name in ("runtime", *kinds))]
            for mode, cells in found.items()
        ],
    )


def serving() -> str:
    rows = inference("serving", THREADS)
    modes = ("float32", "INT8", "INT4")
    rates = {(row["shape"][0], row["name"].split()[1]): row for row in rows}
    return markdown(
        ("sequences", *modes),
        [
            [str(count), *(f"{count / rates[count, mode]['seconds']:,.0f}" for mode in modes)]
            for count in sorted({count for count, _ in rates})
        ],
        left=0,
    )


def times_as_fast() -> dict[tuple[str, int, str], float]:
    """As each rival in the same mode, by kind of work, context and rival: "decode", 512, "Mamba
    INT8"."""
    ratios = {}
    for row in inference("", THREADS):
        if " at " not in row["name"]:
            continue
        kind, _, context, mode = row["name"].split()
        if row["baseline"].endswith(mode):
            ratios[kind, int(context), row["baseline"]] = row["ratio"]
    return ratios


def rivals() -> str:
    columns = [f"{model} {mode}" for model in ("GPT-2", "Mamba") for mode in ("float32", "INT8")]
    ratios = times_as_fast()
    places = sorted(
        {place[:2] for place in ratios}, key=lambda place: (place[0] != "prefill", place)
    )
    return markdown(
        ("", *columns),
        [
            [f"{kind} at {context:,}", *(f"{ratios[kind, context, name]:.1f}" for name in columns)]
            for kind, context in places
        ],
    )


def engine_speeds(report: dict[str, Any], work: str) -> str:
    """Tokens a second by context, and how many times as fast as the other side that is."""
    rows = [row for row in report["rows"] if row["work"] == work]
    contexts = sorted({row["context"] for row in rows})
    cells: dict[tuple[str, str, int], dict[int, str]] = {}
    for row in rows:
        place = row["model"], row["format"], row["threads"]
        ratio = "" if row["ratio"] is None else f" ({times(row['ratio'])})"
        speed = f"{row['own']['tokens_per_second']:,.0f}{ratio}"
        cells.setdefault(place, {})[row["context"]] = speed
    return markdown(
        ("model", "format", "threads", *(f"at {context:,}" for context in contexts)),
        [
            [model, form, str(threads), *(found[context] for context in contexts)]
            for (model, form, threads), found in cells.items()
        ],
        left=2,
    )


def decoding_speeds() -> dict[str, list[tuple[int, float]]]:
    """Parameters and tokens a second of one sequence after 512 tokens, on one thread, by engine."""
    found = defaultdict(set)
    for row in data("engines")["rows"]:
        if (row["work"], row["context"], row["threads"]) != ("decode", 512, 1):
            continue
        dense = ", dense" if row["model"].endswith("dense") else ""
        for side, label in ((row["own"], dense), (row["other"], "")):
            if side is not None:
                point = side["parameters"], side["tokens_per_second"]
                found[side["engine"] + label].add(point)
    return {name: sorted(points) for name, points in found.items()}


def engine_costs(report: dict[str, Any]) -> str:
    """What a token needs after 512 others on one thread, and how close to a plain read it comes."""
    lines: dict[tuple[str, str], list[str]] = {}
    for row in report["rows"]:
        if (row["work"], row["context"], row["threads"]) != ("decode", 512, 1):
            continue
        for side in filter(None, (row["own"], row["other"])):
            ours = side is row["own"]
            model = row["model"] if ours else f"Llama, {side['parameters'] / 1e6:.1f} M"
            lines[model, side["engine"]] = [
                f"{side['bytes'] / 1e6:.2f}",
                f"{side['operations'] / 1e6:.1f}",
                f"{1e6 * side['seconds']:,.0f}",
                f"{side['of_plain_read']:.2f}",
            ]
    return markdown(
        ("model", "engine", "MB", "million operations", "us", "of a plain read"),
        [[*names, *cells] for names, cells in lines.items()],
        left=2,
    )


def layers() -> str:
    ratios = {tuple(row["shape"]): row["ratio"] for row in inference("layer INT8")}
    counts = sorted({count for count, _, _ in ratios})
    shapes = sorted({shape[1:] for shape in ratios}, key=lambda shape: shape[0] * shape[1])
    return markdown(
        ("weight", "numbers", *(f"{count:,} row{'s' * (count > 1)}" for count in counts)),
        [
            [
                f"{outputs} x {inputs}",
                f"{outputs * inputs:,}",
                *(f"{ratios[count, inputs, outputs]:.2f}" for count in counts),
            ]
            for inputs, outputs in shapes
        ],
    )


def stability() -> str:
    int8, int4 = (data(f"stability-{mode}")["ages"] for mode in ("int8", "int4"))
    rows = []
    for pair in zip(int8, int4, strict=True):
        cells = [f"{pair[0]['position']:,}"]
        for age, digits in zip(pair, (3, 1), strict=True):
            kl, error = 1e3 * age["kl"], 1e3 * age["standard_error"]
            cells += [f"{kl:.{digits}f} ± {error:.{digits}f}", f"{max(age['worst']):.3f}"]
        rows.append(cells)
    header = ("tokens read", "INT8: KL, millinats", "error / bound")
    return markdown((*header, "INT4: KL, millinats", "error / bound"), rows, left=0)


def memory() -> str:
    report = data("memory")
    points = {(point["kind"], point["length"]): point for point in report["points"]}
    kinds = list(dict.fromkeys(kind for kind, _ in points))
    header = [f"{kind}{unit}" for kind in kinds for unit in (", MB", ", s")]
    rows = [
        [
            f"{length:,}",
            *(
                cell
                for kind in kinds
                for cell in (
                    f"{points[kind, length]['peak_bytes'] / 1e6:,.0f}",
                    duration(points[kind, length]["seconds"]),
                )
            ),
        ]
        for length in sorted({length for _, length in points})
    ]
    powers = [[f"{report['growth'][kind]['peak_bytes']:.2f}", ""] for kind in kinds]
    rows.append(["power of N from 4,096 on", *(cell for pair in powers for cell in pair)])
    return markdown(("N", *header), rows)


def shipped() -> dict[str, Any]:
    """The report of the shipped model's training."""
    return json.loads((ROOT / "checkpoints/wikitext2/training.json").read_text())


def float32_bytes() -> int:
    """Bytes of the shipped model's parameters in float32."""
    return 4 * shipped()["parameters"]


def smaller(row: dict[str, Any]) -> str:
    """How many times smaller than the shipped model's parameters in float32."""
    return f"{float32_bytes() / row['bytes']:.1f}x"


def training() -> str:
    curve = [entry for entry in shipped()["curve"] if "eval_ppl_word" in entry]
    return markdown(
        ("step", *(f"{entry['step']:,}" for entry in curve)),
        [["perplexity per word", *(f"{entry['eval_ppl_word']:.1f}" for entry in curve)]],
    )


def after_training() -> str:
    header = ("mode", "per word", "change, %", "95 % interval", "KL, nats a token", "MB", "smaller")
    rows = []
    modes = ("ptq_int8", "mixed_precision", "ptq_int4")
    for label, mode in (("float16, as shipped", "float16"), *((f"`{m}`", m) for m in modes)):
        row = data(f"evaluate/{mode}")
        size = [f"{row['bytes'] / 1e6:.2f}", smaller(row)]
        kl = shown(row.get("kl_nats"), ".4f")
        cost = ["", ""] if mode == "float16" else change(row)  # it is what others are compared with
        rows.append([label, f"{row['ppl_word']:.1f}", *cost, kl, *size])
    return markdown(header, rows)


def in_training() -> str:
    header = ("mode", "per word", "against the checkpoint, %", "95 % interval", "KL, nats a token")
    rows = []
    for mode in ("qat_int8", "qat_int4", "qat_int8-no-distill", "qat_int4-no-distill"):
        row, control = data(f"evaluate/{mode}"), data(f"evaluate/{mode}-control")
        kl = shown(row.get("kl_nats"), ".4f")
        name = mode.replace("-", " --", 1)
        rows.append([f"`{name}`", f"{row['ppl_word']:.1f}", *change(row), kl, *change(control)])
    return markdown((*header, "against the control, %", "95 % interval"), rows)


def frontier() -> str:
    header = ("model", "bits a weight", "MB", "change, %", "95 % interval", "predicted, %")
    rows = sorted(data("frontier")["points"], key=lambda row: (row["bytes"], row["name"]))
    budgets = [row for row in rows if row["name"] == "budget"]
    budget = {
        _bits(row): f"budget of the size of {code(row['name'])}"
        for row in rows
        if row["name"] not in ("budget", "saved")
    }
    budget[_bits(budgets[0])] = "budget, all INT4 but the core's activations"
    budget[_bits(budgets[-1])] = "budget, all float16"

    def label(row: dict[str, Any]) -> str:
        if row["name"] == "saved":
            return f"budget of {row['average_bits']:.1f} bits"
        return budget.get(_bits(row), "budget") if row["name"] == "budget" else code(row["name"])

    return markdown(
        header,
        [
            [
                label(row),
                _bits(row),
                f"{row['bytes'] / 1e6:.2f}",
                *change(row),
                shown(row["predicted_pct"], "+.2f"),
            ]
            for row in rows
        ],
    )


def _bits(row: dict[str, Any]) -> str:
    return f"{row['average_bits']:.2f}"


SIZES = {
    "INT8, after training (`ptq_int8`)": "ptq_int8",
    "INT4 experts, INT8 core, float16 head (`mixed_precision`)": "mixed_precision",
    "4.5 bits on average, where they count (`--target-bits 4.5`)": "target_bits_4.5",
    "INT4, after training (`ptq_int4`)": "ptq_int4",
    "INT4, trained 400 steps to imitate float (`qat_int4`)": "qat_int4",
}


def sizes() -> dict[str, Any]:
    """What quantization costs the shipped model: the rows of `SIZES`, by the names of their
    files."""
    return {name: data(f"evaluate/{name}") for name in SIZES.values()}


def overview() -> str:
    rows = zip(SIZES, sizes().values(), strict=True)
    return markdown(
        ("", "MB", "smaller than float32", "perplexity, change in %", "95 % interval"),
        [[label, f"{row['bytes'] / 1e6:.2f}", smaller(row), *change(row)] for label, row in rows],
    )


def demo() -> str:
    report = data("demo")
    header = ("mode", "per token", "bits per byte", "change, %", "95 % interval", "KL, millinats")
    rows = []
    for row in (*report["rows"], report["control"]):
        size = [f"{row['bytes'] / 1e6:.2f}", f"{row['size_ratio']:.2f}x"]
        is_float = row["mode"] == "float32"
        rows.append(
            [
                code(row["mode"]),
                f"{row['ppl_token']:.2f}",
                f"{math.log2(row['ppl_byte']):.3f}",
                *(("", "", "") if is_float else (*change(row), f"{1000 * row['kl_nats']:.2f}")),
                *size,
                f"{row['tokens_per_second']:,.0f}",
                f"{row['speedup']:.2f}x",
            ]
        )
    return markdown((*header, "MB", "smaller", "tokens a second", "as fast"), rows)


def _plain(name: str) -> Callable[[], str]:
    return lambda: plain(name)


PLAIN = ("expert-load", "qat-step-times")
TABLES: dict[str, Callable[[], str]] = {
    "kernels": kernels,
    "language": language,
    "synthetic": synthetic,
    "widths": widths,
    "loops": loops,
    "serving": serving,
    "rivals": rivals,
    "engines-decode": lambda: engine_speeds(data("engines"), "decode"),
    "engines-read": lambda: engine_speeds(data("engines"), "read"),
    "engines-together": lambda: engine_speeds(data("engines"), "together"),
    "engines-costs": lambda: engine_costs(data("engines")),
    "layers": layers,
    "stability": stability,
    "memory": memory,
    "training": training,
    "after-training": after_training,
    "in-training": in_training,
    "frontier": frontier,
    "overview": overview,
    "demo": demo,
    "core-levels": core_levels,
    "core-bounds": core_bounds,
    "core-sizes": core_sizes,
    **{name: _plain(name) for name in PLAIN},
}


def main() -> None:
    """Update the tables of all pages."""
    for page in pages():
        text = page.read_text()
        new = with_tables(text)
        if new != text:
            page.write_text(new)
            print(page.relative_to(ROOT))


if __name__ == "__main__":
    main()
