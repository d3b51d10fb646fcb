"""Public names that are imported when they are asked for (PEP 562), so that a package can be imported at no cost."""

from __future__ import annotations

import ast
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any


def names_of(package: str, file: str) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """
    The `__getattr__` and `__dir__` of a package whose imports stand under `if TYPE_CHECKING:`, where type checkers and
    editors read them, and this function, too.

    Args:
        package: its `__name__`.
        file: its `__file__`.
    """
    homes = {
        alias.asname or alias.name: (f"{'.' * imported.level}{imported.module}", alias.name)
        for block in ast.parse(Path(file).read_text(encoding="utf-8")).body
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for imported in block.body
        if isinstance(imported, ast.ImportFrom)
        for alias in imported.names
    }

    def get(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module, there = homes[name]
        found = getattr(import_module(module, package), there)
        setattr(import_module(package), name, found)  # the next time it is there
        return found

    return get, lambda: sorted({*vars(import_module(package)), *homes})
