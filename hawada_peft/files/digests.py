"""What tells that a folder's files are still those that were written."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from .names import CARD_NAME, REPORT_NAME

PIECE = 2**20
"""Bytes read at a time."""


def digests_of(folder: Path) -> dict[str, str]:
    """
    The SHA-256 of every file in a folder by its name, but for hidden ones, the report, which holds them, and the card,
    which people go on writing.
    """
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    left_out = (CARD_NAME, REPORT_NAME)
    return {name: digest_of(folder / name) for name in names if name not in left_out and not name.startswith(".")}


def digest_problems(folder: Path, stated: Mapping[str, str]) -> list[str]:
    """Which files are gone or others than those that were written, and weights or a config that are not listed."""
    found = digests_of(folder)
    gone = [f"{name} is gone" for name in sorted(stated.keys() - found.keys())]
    new = sorted(
        name for name in found.keys() - stated.keys() if name.endswith(".safetensors") or name == "config.json"
    )
    gone += [f"{name} is not among the files that were written" for name in new]
    return gone + [
        f"{name} is not the file that was written"
        for name, digest in sorted(stated.items())
        if name in found and found[name] != digest
    ]


def digest_of(file: Path) -> str:
    """The SHA-256 of a file."""
    digest = hashlib.sha256()
    with file.open("rb", buffering=0) as opened:
        while piece := opened.read(PIECE):
            digest.update(piece)
    return digest.hexdigest()
