"""Options shared by several commands."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

SHIPPED = Path("checkpoints/wikitext2")
"""The checkpoint in the repository."""

DataOption = Annotated[
    str | None,
    typer.Option(
        metavar="FOLDER|NAME",
        help="Folder of text, or a Hugging Face data set as OWNER/NAME:CONFIG; "
        "default: the embedded corpus.",
    ),
]
JsonOption = Annotated[Path | None, typer.Option("--json", help="Also write the result here.")]
PlotOption = Annotated[Path | None, typer.Option(help="Draw a picture: .png or .svg.")]
