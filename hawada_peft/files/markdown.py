"""Text from outside in a Markdown file: it says what it says, and does nothing there."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

CODE = re.compile(r"(`[^`]*`)")
SPECIAL = re.compile(r"([\\`*\[\]<>!#~$]|(?<![\w])_|_(?![\w]))")


def prose(value: Any) -> str:
    """One line of plain text, in a sentence, a table or a list; spans of code stay."""
    pieces = CODE.split(_line(value))
    return "".join(piece if CODE.fullmatch(piece) else _escaped(piece) for piece in pieces).replace("|", "/")


def code(value: Any) -> str:
    """The inside of a span of code."""
    return _line(value).replace("`", "'").replace("|", "/")


def quoted(value: Any) -> str:
    """A string in Python, on one line."""
    return json.dumps(_line(value), ensure_ascii=False)


def place_of(name: str) -> str:
    """A model's id as it is; of a folder the last part, which is all that others need to know of it."""
    path = Path(name)
    local = path.is_absolute() or name.startswith(("~", ".")) or "\\" in name or path.is_dir()
    return (re.split(r"[\\/]", name.rstrip("\\/"))[-1] or "folder") if local else name


def _line(value: Any) -> str:
    return " ".join("".join(c if c.isprintable() else " " for c in str(value)).split())


def _escaped(text: str) -> str:
    text = text.replace("&", "&amp;")
    text = SPECIAL.sub(r"\\\1", text).replace("\\<", "&lt;").replace("\\>", "&gt;")
    return text.replace("://", ":&#47;&#47;").replace("www.", "www&#46;").replace("@", "&#64;")
