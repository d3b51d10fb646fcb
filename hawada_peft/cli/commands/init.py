"""`hawada init`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..data import DATA, check_data, fields_of_data
from ..options import FILE, Effort, Level, Model, Said
from ..tables import spoken

if TYPE_CHECKING:
    from ...recipes.draft import Draft

EXAMPLES = (
    "hawada init ./teacher text.txt --speedup 1.5 --batch-size 8 --seq-len 256",
    "hawada init ./teacher text.txt --plan plan.json --speedup 1.5 --seq-len 256 --output recover.yaml",
    "hawada init ./vit ./photos --latency-ms 8 --batch-size 64 --effort quick",
)


def run(
    model: Model,
    data: Annotated[str, typer.Argument(metavar="DATA", help=DATA, show_default=False)],
    to: Annotated[Path, typer.Option("--output", help="Where to write the recipe.")] = Path("recipe.yaml"),
    folder: Annotated[str, typer.Option(help="Where the recipe writes everything.")] = "out",
    plan: Annotated[
        Path | None, typer.Option(help="Plan of `hawada plan`: no gates are trained, only recovery.", **FILE)
    ] = None,
    effort: Level = Effort.normal,
    **budget: Any,
) -> Said:
    """
    Write a recipe for a model, data and a budget.

    With an estimate of time and memory. All numbers are starting points by the model's size and this machine's speed:
    read the recipe, change it, run it with `hawada train`. No weights are loaded.
    """
    import yaml  # type: ignore[import-untyped]

    from ...files.atomic import write_text
    from ...latency.budget import LatencyBudget
    from ...recipes.draft import draft_recipe
    from ...recipes.recipe import Recipe
    from ...recipes.words import steps_of
    from ...vanilla.loading import load_skeleton

    made = draft_recipe(
        model,
        load_skeleton(model),
        fields_of_data(data),
        LatencyBudget(**budget),
        output=folder,
        plan=None if plan is None else str(plan),
        effort=effort,
    )
    recipe = Recipe.from_dict(made.recipe)
    head = "\n".join(f"# {line}" for line in ["Written by `hawada init`. To run it: hawada train", *_estimates(made)])
    write_text(to, f"{head}\n{yaml.safe_dump(dict(made.recipe), sort_keys=False)}")
    steps = steps_of(recipe)
    lines = [*(f"{number}. {step}" for number, step in enumerate(steps, 1)), *_estimates(made)]
    facts = {"recipe": str(to), "steps": steps, "seconds": dict(made.seconds), "bytes": made.bytes}
    further = (f"hawada train {to} --dry-run", f"hawada train {to}")
    return Said("\n".join([*lines, f"recipe written to {to}"]), facts, next=further)


def check(model: str, data: str, to: Path, **options: Any) -> None:
    """Refuse a budget that contradicts itself, what is not there, and to overwrite."""
    from ...latency.budget import LatencyBudget
    from ...sources import check_source

    LatencyBudget(**{name: each for name, each in options.items() if name in LatencyBudget.__dataclass_fields__})
    check_data(data)
    check_source(model)
    if to.exists():
        raise FileExistsError(f"{to} exists; name another --output, or move it away")


def _estimates(made: Draft) -> list[str]:
    """What the trainings take, as far as sizes tell."""
    trainings = ", ".join(f"{name} about {spoken(seconds)}" for name, seconds in made.seconds.items() if seconds)
    return [
        f"Estimates at {made.rate / 1e9:,.0f} GFLOP/s, as measured here now: {trainings}; the search comes on top.",
        f"Memory: about {made.bytes / 2**30:.1f} GiB for weights, gradients and optimizer, and activations.",
    ]
