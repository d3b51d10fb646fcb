"""The command line: `hawada`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Hardware-aware slimming of Hugging Face models.", no_args_is_help=True, add_completion=False)


@app.callback()
def _root() -> None:
    """Hardware-aware slimming of Hugging Face models."""


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Folder for teachers, adapters and slim models.")] = Path("demo-output"),
    quick: Annotated[bool, typer.Option("--quick", help="A shorter training: under a minute on two cores.")] = False,
) -> None:
    """Train two small teachers on real data, slim them, and print what came out."""
    # Here, so that the other commands do not need scikit-learn.
    from .demo import render, run_demo

    try:
        rows = run_demo(output, quick=quick)
    except FileExistsError as error:
        typer.echo(f"{error}. Remove it, or name another folder with --output.", err=True)
        raise typer.Exit(code=2) from None
    typer.echo(render(rows))


def main() -> None:
    """The entry point of the `hawada` script."""
    app()
