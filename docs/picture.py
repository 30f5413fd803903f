"""The figure at the top of the README; `make tables` draws it.

Its figures are those of the tables "overview" and "engines-decode": `docs.tables` finds them.
"""

from __future__ import annotations

import matplotlib as mpl

mpl.use("svg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from docs.pages import ROOT
from docs.tables import data, decoding_speeds, float32_bytes, sizes

LABELS = {
    "ptq_int8": "INT8",
    "mixed_precision": "mixed",
    "target_bits_4.5": "4.5 bits",
    "qat_int4": "INT4, trained to imitate",
    "ptq_int4": "INT4",
}
ACCENT = "#1f6f8b"
ENGINES = {
    "bkcore INT4": ("o-", ACCENT),
    "bkcore INT8": ("o--", ACCENT),
    "bkcore INT8, dense": ("D", ACCENT),
    "llama.cpp Q4_0": ("s-", "#5b5b5b"),
    "llama.cpp Q8_0": ("s--", "#5b5b5b"),
}
"""How a line of the right panel looks."""


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
    """Tokens a second of one sequence against parameters, beside llama.cpp."""
    speeds = decoding_speeds()
    for engine, (look, color) in ENGINES.items():
        axes.loglog(*zip(*speeds[engine], strict=True), look, color=color, label=engine)
    axes.set(
        xlim=(3.5e6, 1.5e8),
        xlabel="parameters",
        ylabel="tokens a second",
        title="Writing speed, one thread",
    )
    axes.set_xticks([5e6, 1e7, 2e7, 5e7, 1e8], ["5 M", "10 M", "20 M", "50 M", "100 M"])
    axes.minorticks_off()
    axes.legend(frameon=False)


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
