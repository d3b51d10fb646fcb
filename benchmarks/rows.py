"""Rows of a benchmark in a file of JSON lines, to which many processes may append."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def read_rows(path: str | Path) -> list[Row]:
    """The rows that are there; none if there is no file."""
    path = Path(path)
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def append_row(path: str | Path, row: Row) -> None:
    """Add a row, in one write, so that rows of several processes do not mix."""
    with Path(path).open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
