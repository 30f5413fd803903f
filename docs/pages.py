"""The pages of the documentation, and the Python blocks in them."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def pages() -> list[Path]:
    """The README and all pages of the site, in all folders."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def run_blocks(page: Path, folder: Path) -> None:
    """Run the Python blocks of a page in order, in a folder, as a reader would paste them."""
    text = page.read_text()
    namespace: dict[str, Any] = {"__name__": "__main__"}
    before = Path.cwd()
    os.chdir(folder)
    try:
        for block in BLOCK.finditer(text):
            line = text[: block.start(1)].count("\n")
            # Newlines in front make tracebacks show the line of the page.
            exec(compile("\n" * line + block[1], str(page), "exec"), namespace)
    finally:
        os.chdir(before)
