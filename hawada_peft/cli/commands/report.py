"""`hawada report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..options import FILE, FOLDER, Said, Slim

EXAMPLES = (
    "hawada report ./slim",
    "hawada report out/slim --training out --output page",
    "hawada report ./slim --peers peers.json --no-pictures --json",
)


def run(
    slim: Slim,
    output: Annotated[Path | None, typer.Option(help="Folder for the page and the pictures.")] = None,
    training: Annotated[Path | None, typer.Option(help="Folder of the training that made it.", **FOLDER)] = None,
    search: Annotated[
        Path | None, typer.Option(help="File of the search, as `hawada plan` leaves it.", **FILE)
    ] = None,
    peers: Annotated[Path | None, typer.Option(help="File of other models' measurements.", **FILE)] = None,
    pictures: Annotated[bool, typer.Option(help="Also write the pictures as files.")] = True,
) -> Said:
    """Write a page about a slim model: what was cut, and what it costs."""
    from ...page.write import write_report

    written = write_report(slim, output, training=training, search=search, peers=peers, pictures=pictures)
    return Said(str(written), written.to_dict())
