"""Tables that a block of code on a page prints: runs the block, and keeps what it printed.

This command runs the blocks and writes their lines into `docs/data`, for `make tables`:

    python -m docs.printed
"""

from __future__ import annotations

import contextlib
import datetime
import io
import json
from typing import Any

from docs.pages import BLOCK, ROOT

PAGE = ROOT / "docs/quantization.md"
NAMES = {
    "core-levels": "def error(",
    "core-bounds": "def tightness(",
    "core-sizes": "def ratio(",
}
"""The tables, and how the block that prints each begins, after its imports."""


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
