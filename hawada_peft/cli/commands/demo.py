"""`hawada demo`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from ...progress import Progress
from ..options import Said

EXAMPLES = ("hawada demo --quick", "hawada demo --output /tmp/demo --json")


def run(
    progress: Progress | None,
    output: Annotated[Path, typer.Option(help="Folder for teachers, adapters and slim models.")] = Path("demo-output"),
    quick: Annotated[bool, typer.Option("--quick", help="A shorter training: under a minute on two cores.")] = False,
) -> Said:
    """
    Train two small teachers, slim them, and print what came out.

    On data that installed packages carry; needs `pip install hawada_peft[examples]`.
    """
    from ...demo.pipeline import run_demo
    from ...demo.table import render

    rows = run_demo(output, quick=quick, progress=progress)
    return Said(render(rows), {"rows": [asdict(row) for row in rows]})
