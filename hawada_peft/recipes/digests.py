"""What a recipe's model and data were when it began: a run is resumed on the same ones only."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from transformers import AutoConfig

if TYPE_CHECKING:
    from .recipe import Recipe

PART = 2**20
"""Bytes that are read at a time."""


def digests_of(recipe: Recipe) -> dict[str, str]:
    """
    One digest for each thing that the recipe names: SHA-256 of a file, of all files of a model's folder, of the names
    and sizes in a folder of images; the commit of a model on the Hub. What is not known here has none.

    Args:
        recipe: whose files are there.
    """
    model = Path(recipe.model)
    found = {"model": _folder(model) if model.is_dir() else _commit(recipe.model)}
    found |= {
        f"data {path}": _listing(Path(path)) if Path(path).is_dir() else _file(Path(path))
        for path in recipe.source().paths()
    }
    return {name: digest for name, digest in found.items() if digest is not None}


def _file(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as opened:
        while part := opened.read(PART):
            digest.update(part)
    return digest.hexdigest()


def _folder(folder: Path) -> str:
    return _joined(f"{path.name} {_file(path)}" for path in sorted(folder.iterdir()) if path.is_file())


def _listing(folder: Path) -> str:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return _joined(f"{path.relative_to(folder)} {path.stat().st_size}" for path in files)


def _commit(model: str) -> str | None:
    return getattr(AutoConfig.from_pretrained(model), "_commit_hash", None)


def _joined(lines: Iterator[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
