"""What a command line may name as data, told apart without reading it."""

from __future__ import annotations

import mimetypes
from pathlib import Path
from typing import Any

import typer

DATA = (
    "Examples: a file (.txt, .md, .jsonl with a text or chat messages in every line, .safetensors of inputs, .npy), a "
    "folder of images or of .wav files, or a dataset, as NAME, NAME:CONFIG or NAME:CONFIG:SPLIT."
)

FILES = (".txt", ".md", ".jsonl", ".safetensors", ".npy")


def fields_of_data(data: str) -> dict[str, Any]:
    """
    The fields of `DataSource` that data is named by.

    Args:
        data: a file or folder that is there; or the name of a dataset, its config and its split, between colons.
    """
    if Path(data).exists():
        return {"files": data}
    parts = dict(zip(("dataset", "config", "split"), data.split(":", 2), strict=False))
    return {name: part for name, part in parts.items() if part}


def check_data(data: str) -> None:
    """
    Refuse a file that is not there, or of a kind that is not read.

    Raises:
        typer.BadParameter: if it is neither there, nor could be a dataset's name.
    """
    path = Path(data)
    if path.exists():
        return
    if path.suffix in FILES or path.is_absolute() or data.startswith((".", "~")):
        raise typer.BadParameter(f"the file or folder {data!r} does not exist")
    if mimetypes.guess_type(data)[0] is not None:
        raise typer.BadParameter(f"data must be a file of {list(FILES)}, a folder, or a dataset's name, got {data!r}")
