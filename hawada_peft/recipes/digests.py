"""What a recipe's model and data were when it began: a run is resumed on the same ones only."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from transformers import AutoConfig

from ..files.digests import digest_of, digests_of

if TYPE_CHECKING:
    from .recipe import Recipe


def recipe_digests(recipe: Recipe) -> dict[str, str]:
    """
    One digest for each thing that the recipe names: of a file's bytes, of all files of a model's folder, of the names
    and sizes in a folder of images; the commit of a model on the Hub. What is not known here has none.

    Args:
        recipe: whose files are there.
    """
    model = Path(recipe.model)
    found = {"model": _all(digests_of(model)) if model.is_dir() else _commit(recipe.model)}
    for path in map(Path, recipe.source().paths()):
        found[f"data {path}"] = _all(_sizes(path)) if path.is_dir() else digest_of(path)
    if recipe.plan is not None:
        found["plan"] = digest_of(Path(recipe.plan))
    return {name: digest for name, digest in found.items() if digest is not None}


def _sizes(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): str(path.stat().st_size) for path in folder.rglob("*") if path.is_file()}


def _commit(model: str) -> str | None:
    return getattr(AutoConfig.from_pretrained(model), "_commit_hash", None)


def _all(facts: Mapping[str, str]) -> str:
    return hashlib.sha256("\n".join(f"{name} {fact}" for name, fact in sorted(facts.items())).encode()).hexdigest()
