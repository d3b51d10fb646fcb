"""What a page is made of, as plain values for its template. All text is escaped there."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from .drawing import Picture

Part = dict[str, Any]


def text(line: str, *, note: bool = False) -> Part:
    """A paragraph; a smaller one if it is a note."""
    return {"kind": "text", "text": line, "note": note}


def figure(picture: Picture, note: str) -> Part:
    """A picture and what is below it."""
    return {"kind": "figure", "picture": picture, "note": note}


def table(caption: str, head: Sequence[str], rows: Iterable[Sequence[Any]], *, chosen: int | None = None) -> Part:
    """
    A table.

    Args:
        caption: what it shows.
        head: the columns.
        rows: cells; the first of each is its name. Numbers must be given as text by `number`.
        chosen: the row that is marked.
    """
    lines = [
        {"name": row[0], "cells": [_cell(value) for value in row[1:]], "chosen": place == chosen}
        for place, row in enumerate(rows)
    ]
    kinds = ["", *(cell["kind"] for cell in lines[0]["cells"])] if lines else [""] * len(head)
    heads = [{"text": name, "kind": kind} for name, kind in zip(head, kinds, strict=True)]
    return {"kind": "table", "table": {"caption": caption, "head": heads, "rows": lines}}


def folded(summary: str, part: Part) -> Part:
    """A table that is shown on demand."""
    return {"kind": "folded", "summary": summary, "table": part["table"]}


class Number(str):
    """A number as text."""


def number(value: float | None, form: str = ",.4g", unit: str = "") -> Number:
    """
    A number as text; empty if it is not known.

    Args:
        value: the number.
        form: as in `format`.
        unit: written after it.
    """
    return Number("" if value is None else f"{value:{form}}{unit}")


def _cell(value: Any) -> dict[str, str]:
    if isinstance(value, Number):
        return {"kind": "number", "text": value}
    return {"kind": "text" if len(str(value)) > 40 else "", "text": str(value)}
