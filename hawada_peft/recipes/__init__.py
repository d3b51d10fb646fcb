"""Recipes: a whole slimming as a YAML file, read by `hawada train`."""

from .recipe import Recipe
from .result import RecipeResult
from .run import train_recipe

__all__ = ["Recipe", "RecipeResult", "train_recipe"]
