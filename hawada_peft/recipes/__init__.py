"""Recipes: a whole slimming as a YAML file, read by `hawada train`."""

from .draft import Draft, draft_recipe
from .recipe import Recipe
from .result import RecipeResult
from .run import train_recipe
from .words import steps_of

__all__ = ["Draft", "Recipe", "RecipeResult", "draft_recipe", "steps_of", "train_recipe"]
