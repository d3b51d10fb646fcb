"""`hawada inspect`."""

from __future__ import annotations

from typing import Annotated

import typer

from ..options import Said

EXAMPLES = (
    "hawada inspect ./teacher",
    "hawada inspect ./teacher/config.json --json",
)


def run(
    model: Annotated[str, typer.Argument(help="Folder, config file or id; no weights needed.", show_default=False)],
    fresh: Annotated[bool, typer.Option("--fresh", help="Find it again, even if it is kept here.")] = False,
) -> Said:
    """
    Say what can be removed of a model, and what cannot and why.

    Found and proved on a tiny copy of the model's class; the model's weights are not read.
    """
    from ...discovery.inspected import inspect
    from ...discovery.table import table_of

    found = inspect(model, fresh=fresh)
    return Said(table_of(found), found.to_dict())
