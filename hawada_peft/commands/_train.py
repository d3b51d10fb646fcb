"""`hawada train` as a call."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, overload

from ..progress import Progress
from ..recipes.recipe import Recipe
from ..recipes.result import RecipeResult
from ..recipes.run import train_recipe


@dataclass(frozen=True)
class TrainSteps:
    """
    What a recipe would do.

    Args:
        recipe (`Recipe`): checked.
        steps (`tuple[str, ...]`): in words.
        missing (`tuple[str, ...]`): data files that are not here.
    """

    recipe: Recipe
    steps: tuple[str, ...]
    missing: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"recipe": self.recipe.to_dict(), "steps": list(self.steps), "missing": list(self.missing)}

    def __str__(self) -> str:
        lines = [f"{number}. {step}" for number, step in enumerate(self.steps, 1)]
        return "\n".join([*lines, *(f"missing here: {path}" for path in self.missing)])


@overload
def train(
    recipe: str | os.PathLike[str],
    *,
    set: Iterable[str] = (),
    resume: bool = False,
    dry_run: Literal[False] = False,
    progress: Progress | None = None,
) -> RecipeResult: ...


@overload
def train(
    recipe: str | os.PathLike[str],
    *,
    set: Iterable[str] = (),
    resume: bool = False,
    dry_run: bool,
    progress: Progress | None = None,
) -> RecipeResult | TrainSteps: ...


def train(
    recipe: str | os.PathLike[str],
    *,
    set: Iterable[str] = (),
    resume: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> RecipeResult | TrainSteps:
    """
    Slim a model as a recipe says (`train_recipe`): train gates, merge, refit, recover, measure, save verified.

    Args:
        recipe: YAML file.
        set: other values: `"section.name=value"`.
        resume: go on where an interrupted run stopped.
        dry_run: check the recipe, and tell what it would do.
        progress: `tqdm.tqdm` for progress bars. Without it the trainers print lines.

    Returns:
        `RecipeResult`; `TrainSteps` if `dry_run`.

    Raises:
        HawAdaError: on whatever is wrong with the recipe, before any work.
        FileNotFoundError, FileExistsError: if data is missing, or the output folder holds something else.
    """
    read = Recipe.read(recipe, set)
    if dry_run:
        return TrainSteps(read, tuple(read.steps()), tuple(read.missing_files()))
    return train_recipe(read, resume=resume, progress=progress)
