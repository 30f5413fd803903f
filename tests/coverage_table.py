"""Print how many lines and branches of each package the tests ran through.

Usage: coverage_table.py REPORT, which is what `coverage json` writes.
"""

import json
import sys
from collections import Counter
from pathlib import Path

from rich.console import Console
from rich.table import Table

SOURCES = (Path("src"), Path("runtime/src"))

COUNTED = ("covered_lines", "num_statements", "covered_branches", "num_branches")


def sums(report: Path) -> dict[str, Counter[str]]:
    """What coverage.py counts in each file, added up by package, and all of it last."""
    by_package: dict[str, Counter[str]] = {}
    files = json.loads(report.read_text())["files"]
    for name in sorted(files):
        source = next(each for each in SOURCES if Path(name).is_relative_to(each))
        package = ".".join(Path(name).relative_to(source).parent.parts)
        counts = {each: files[name]["summary"][each] for each in COUNTED}
        by_package.setdefault(package, Counter()).update(counts)
    every: Counter[str] = Counter()
    for found in by_package.values():
        every.update(found)
    return {**by_package, "all": every}


def main(report: Path) -> None:
    table = Table("package", title="What the tests in Python run through, in %")
    for name in ("lines", "of", "branches", "of"):
        table.add_column(name, justify="right")
    for package, found in sums(report).items():
        lines, branches = found["num_statements"], found["num_branches"]
        table.add_row(
            package,
            f"{100 * found['covered_lines'] / max(lines, 1):.1f}",
            f"{lines:,}",
            f"{100 * found['covered_branches'] / max(branches, 1):.1f}",
            f"{branches:,}",
        )
    Console(width=100).print(table)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
