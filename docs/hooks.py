"""What `mkdocs build` adds to the pages: help of the commands, figures of tutorials, MathJax."""

from __future__ import annotations

import contextlib
import tempfile
from importlib.resources import files as resources
from pathlib import Path

import typer
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from typer.cli import get_docs_for_click

from bkcore.cli import app
from docs.pages import run_blocks

DOCS = Path(__file__).parent
FIGURES = {"tutorials/disordered-chain.md": ("disordered-chain.svg",)}
"""Pages whose code blocks draw figures, and the figures."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the files that are generated at build time."""
    made: dict[str, str | bytes] = {"reference/commands.md": commands(), **figures()}
    for uri, content in made.items():
        files.append(File.generated(config, uri, content=content))
    for uri, path in mathjax().items():
        files.append(File.generated(config, uri, abs_src_path=str(path)))
    return files


def commands() -> str:
    """The help of every command, as Markdown."""
    command = typer.main.get_command(app)
    help_pages = get_docs_for_click(
        obj=command, ctx=typer.Context(command, info_name="bkcore"), name="bkcore"
    )
    return help_pages.replace("# `bkcore`", "# Commands", 1)


def figures() -> dict[str, bytes]:
    """The figures that the code blocks of tutorials draw, by their path in the site."""
    drawn = {}
    for page, names in FIGURES.items():
        with tempfile.TemporaryDirectory() as folder:
            with contextlib.redirect_stdout(None):
                run_blocks(DOCS / page, Path(folder))
            for name in names:
                drawn[str(Path(page).with_name(name))] = (Path(folder) / name).read_bytes()
    return drawn


def mathjax() -> dict[str, Path]:
    """MathJax and its fonts, so that pages render formulas without a network."""
    root = Path(str(resources("mathjax"))) / "static/mathjax/es5"
    fonts = (root / "output/chtml/fonts/woff-v2").glob("*.woff")
    return {
        f"mathjax/{path.relative_to(root).as_posix()}": path
        for path in [root / "tex-chtml.js", *fonts]
    }
