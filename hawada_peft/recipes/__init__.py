"""Recipes: a whole slimming as a YAML file, read by `hawada train`."""

from .recipe import Recipe
from .result import RecipeResult
from .run import train_recipe
from .words import steps_of

__all__ = ["Recipe", "RecipeResult", "steps_of", "train_recipe"]
