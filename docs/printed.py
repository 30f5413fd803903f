"""Tables that a block of code on a page prints.

This command runs the blocks and writes their lines into `docs/data`, for `make tables`:

    python -m docs.printed
"""

from __future__ import annotations

import ast
import contextlib
import datetime
import io
import json
from collections.abc import Iterator
from typing import Any

from docs.cells import code, markdown
from docs.pages import BLOCK, ROOT

PAGE = ROOT / "docs/quantization.md"
NAMES = {
    "core-levels": "def error(",
    "core-bounds": "def tightness(",
    "core-sizes": "def ratio(",
}
"""The tables, and how the block that prints each begins, after its imports."""


def printed(name: str) -> Iterator[tuple[str, Any]]:
    """What was kept of a block of code: the words of each line, and the value behind."""
    for line in json.loads((ROOT / f"docs/data/{name}.json").read_text())["lines"]:
        words, bracket, value = line.partition("[")
        yield words.strip(), ast.literal_eval(bracket + value) if bracket else line.split()


def core_levels() -> str:
    return markdown(
        ("error in percent, even and fitted levels", "eta = 1", "0.3"),
        [
            [code(mode), *(f"{even}, {fitted}" for _, even, fitted in errors)]
            for mode, errors in printed("core-levels")
        ],
    )


BOUNDS = {
    "INT8": "INT8, sigma = 1",
    "INT8, causal": "INT8, sigma = 1, causal",
    "INT4": "INT4, sigma = 1",
    "sigma 0.3": "INT8, sigma = 0.3, E = -2 (the band centre)",
    "sigma 0.1": "INT8, sigma = 0.1, E = -2",
}


def core_bounds() -> str:
    return markdown(
        ("", "eta = 1", "0.3", "0.1", "0.05"),
        [[BOUNDS[what], *map(str, ratios)] for what, ratios in printed("core-bounds")],
    )


def core_sizes() -> str:
    (one, four, whole), (one_qat, four_qat, table), *int4 = [
        [f"{float(ratio):.2f}x" for ratio in ratios] for _, ratios in printed("core-sizes")
    ]
    scales = ("one per position", "4 per tensor", "one per tensor")
    groups = ("`group_size=1`", "`group_size=128`", "`per_channel=False`")
    sizes = {"INT8": (one, four, whole), "INT4": int4[0]}
    plain = {
        bits: [[f"{bits}, {how}", *rest] for how, *rest in zip(groups, scales, ratios, strict=True)]
        for bits, ratios in sizes.items()
    }
    both = f"{scales[0]}, {scales[1]}"
    return markdown(
        ("", "scales", "compression"),
        [
            *plain["INT8"],
            [
                "`qat_int8`, `group_size=1` and 128, with its tables of levels",
                both,
                f"{one_qat}, {four_qat}",
            ],
            *plain["INT4"],
            ["`qat_int4`, `group_size=128`, `nonuniform=True`", scales[1], table],
        ],
    )


def main() -> None:
    """Run the page's blocks up to the last of these, and write what each of these printed."""
    blocks = [found[1] for found in BLOCK.finditer(PAGE.read_text())]
    places = {name: _place(text, blocks) for name, text in NAMES.items()}
    namespace: dict[str, Any] = {"__name__": "__main__"}
    printed = [_printed(block, namespace) for block in blocks[: max(places.values()) + 1]]
    for name, place in places.items():
        content = {
            "command": "python -m docs.printed",
            "date": datetime.date.today().isoformat(),
            "lines": printed[place].splitlines(),
        }
        path = ROOT / "docs/data" / f"{name}.json"
        path.write_text(json.dumps(content, indent=2) + "\n")
        print(path.relative_to(ROOT))


def _place(text: str, blocks: list[str]) -> int:
    (place,) = [index for index, block in enumerate(blocks) if text in block]
    return place


def _printed(block: str, namespace: dict[str, Any]) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(compile(block, str(PAGE), "exec"), namespace)
    return out.getvalue()


if __name__ == "__main__":
    main()
