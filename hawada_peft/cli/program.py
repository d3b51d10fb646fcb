"""The program: its commands in the order of the way, and what holds for all of them."""

from __future__ import annotations

from typing import Annotated

import typer

from .. import __version__
from .commands import demo, evaluate, init, inspect, measure, narrow, plan, push, report, slim, train, verify
from .errors import EXIT_CODES
from .options import add, listed

WHOLE_WAY = (
    "hawada inspect ./teacher                                   what can be removed",
    "hawada measure ./teacher --batch-size 8 --seq-len 256      what sizes cost here",
    "hawada narrow ./vit ./photos ./narrow --head-dim 32        less in each head, for a start",
    "hawada plan ./teacher text.txt --speedup 1.5 --seq-len 256 the best shape so fast",
    "hawada slim ./teacher ./slim --plan plan.json              without training; or",
    "hawada init ./teacher text.txt --speedup 1.5 --seq-len 256 a recipe, to train by",
    "hawada train recipe.yaml                                   gates, merge, recover",
    "hawada evaluate ./slim --base ./teacher --data text.txt    quality and latency",
    "hawada verify ./slim && hawada report ./slim               is it sound; a page on it",
    "hawada push ./slim name/model                              on the Hub",
)

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="\n\n".join(
        [
            listed("The whole way:", WHOLE_WAY),
            listed("Exit codes:", [f"{code:3}  {meaning}" for code, meaning in EXIT_CODES.items()]),
        ]
    ),
)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"hawada_peft {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Hardware-aware slimming of Hugging Face models."""


for module, check in (
    (demo, None),
    (inspect, None),
    (init, init.check),
    (measure, measure.check),
    (narrow, narrow.check),
    (plan, plan.check),
    (slim, slim.check),
    (train, None),
    (evaluate, evaluate.check),
    (verify, None),
    (report, None),
    (push, None),
):
    add(app, module.run, module.EXAMPLES, check)
