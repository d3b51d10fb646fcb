"""`hawada train`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ...progress import Progress
from ..options import FILE, Said

EXAMPLES = (
    "hawada train examples/recipes/tiny.yaml --dry-run",
    "hawada train examples/recipes/llama-3.2-1b-h200.yaml --set budget.speedup=2",
    "hawada train recipe.yaml --resume --json > result.json",
    "accelerate launch -m hawada_peft.cli train recipe.yaml",
)


def run(
    recipe: Annotated[Path, typer.Argument(help="YAML file: model, data, budget, gates, training, ...", **FILE)],
    progress: Progress | None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="Another value: section.name=value, as often as needed.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where an interrupted run stopped.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check the recipe, and print what it would do.")] = False,
) -> Said | None:
    """
    Slim a model as a recipe says, from gates to a verified folder.

    Train gates, merge, refit, recover, measure, save verified. On several GPUs start it with accelerate or torchrun;
    one process prints.
    """
    from accelerate import PartialState  # type: ignore[import-untyped]

    from ...processes import run_program
    from ...recipes.here import missing_here
    from ...recipes.recipe import Recipe
    from ...recipes.run import train_recipe
    from ...recipes.words import steps_of

    read = Recipe.read(recipe, overrides or ())
    if dry_run:
        steps, missing = steps_of(read), missing_here(read)
        lines = [f"{number}. {step}" for number, step in enumerate(steps, 1)]
        text = "\n".join([*lines, *(f"missing here: {each}" for each in missing)])
        return Said(text, {"recipe": read.to_dict(), "steps": steps, "missing": missing})
    result = run_program(lambda: train_recipe(read, resume=resume, progress=progress))
    return Said(str(result), result.to_dict()) if PartialState().is_main_process else None
