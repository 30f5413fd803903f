"""The figure at the top of the README; `make tables` draws it.

Its figures are those of the tables "overview" and "rivals": `docs.tables` finds them.
"""

from __future__ import annotations

import matplotlib as mpl

mpl.use("svg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from docs.pages import ROOT
from docs.tables import data, float32_bytes, sizes, times_as_fast

LABELS = {
    "ptq_int8": "INT8",
    "mixed_precision": "mixed",
    "target_bits_4.5": "4.5 bits",
    "qat_int4": "INT4, trained to imitate",
    "ptq_int4": "INT4",
}
RIVALS = {"GPT-2 INT8": "#9a9a9a", "Mamba INT8": "#5b5b5b"}
WORK = {
    ("prefill", 4096): "read\n4,096 tokens",
    ("decode", 512): "write, at\ntoken 512",
    ("decode", 4096): "write, at\ntoken 4,096",
    ("decode", 16384): "write, at\ntoken 16,384",
}
ACCENT = "#1f6f8b"


def quality(axes: Axes) -> None:
    """Perplexity of the shipped model against its size in bytes."""
    floats = {"float32": float32_bytes(), "float16": data("evaluate/float16")["bytes"]}
    for label, size in floats.items():
        axes.plot(size / 1e6, 0, "o", color="#5b5b5b")
        axes.annotate(label, (size / 1e6, 0), (0, 8), textcoords="offset points", ha="center")
    for name, row in sizes().items():
        size, change = row["bytes"] / 1e6, row["delta_pct"]
        spread = [[change - row["ci_low_pct"]], [row["ci_high_pct"] - change]]
        axes.errorbar(size, change, spread, fmt="o", color=ACCENT, capsize=2)
        axes.annotate(LABELS[name], (size, change), (8, 2), textcoords="offset points")
    axes.set(
        xscale="log",
        xlim=(2.3, 26),
        ylim=(-0.15, 2.45),
        xlabel="MB, without the tokenizer",
        ylabel="perplexity, change in %",
        title="Quality against size",
    )
    axes.set_xticks([2.5, 5, 10, 20], ["2.5", "5", "10", "20"])
    axes.minorticks_off()


def speed(axes: Axes) -> None:
    """Speed relative to well-known models of equal size, all in INT8."""
    ratios = times_as_fast()
    width = 0.38
    for index, (rival, color) in enumerate(RIVALS.items()):
        heights = [ratios[(*work, rival)] for work in WORK]
        places = [place + (index - 0.5) * width for place in range(len(WORK))]
        bars = axes.bar(places, heights, width, color=color, label=f"as {rival.split()[0]}")
        axes.bar_label(bars, [f"{height:.1f}x" for height in heights], padding=2)
    axes.axhline(1, color=ACCENT, linewidth=1)
    axes.set_xticks(range(len(WORK)), WORK.values())
    axes.set(
        yscale="log",
        ylim=(0.8, 60),
        ylabel="times as fast",
        title="Speed against models of equal size, INT8",
    )
    axes.set_yticks([1, 3, 10, 30], ["1", "3", "10", "30"])
    axes.minorticks_off()
    axes.legend(frameon=False, loc="upper right")


def main() -> None:
    """Draw `docs/images/front.svg`."""
    mpl.rcParams["svg.hashsalt"] = "bkcore"
    mpl.rcParams["font.size"] = 10
    figure, (left, right) = plt.subplots(1, 2, figsize=(10.5, 3.8), layout="constrained")
    quality(left)
    speed(right)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    place = ROOT / "docs/images/front.svg"
    place.parent.mkdir(exist_ok=True)
    figure.savefig(place, metadata={"Date": None})


if __name__ == "__main__":
    main()
