"""The order of the package's parts: each imports only what stands below it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "hawada_peft"

FLOORS = (
    "cli",
    "demo",
    "recipes",
    "page",
    "training",
    "registered",
    "model",
    "distil",
    "evaluation",
    "shipping",
    "race",
    "walked",
    "search",
    "tuner",
    "basis",
    "surgery",
    "refit",
    "planning",
    "config",
    "gates",
    "latency",
    "files",
    "discovery",
    "vanilla",
    "_register",
    "folders",
    "processes",
    "progress",
    "sources",
    "lazy",
    "errors",
)
"""From the top down; as docs/architecture.md lists them."""

MOST_LINES = 250
"""Of a module that does not say why it is longer."""

MODULES = sorted(PACKAGE.rglob("*.py"))


def part_of(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def name_of(path: Path) -> str:
    parts = [PACKAGE.name, *path.relative_to(PACKAGE).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path) -> Iterator[tuple[str, str]]:
    """Every import from the package itself: the module and the name."""
    here = name_of(path).split(".") if path.name == "__init__.py" else name_of(path).split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            module = ".".join(here[: len(here) - node.level + 1] + ([node.module] if node.module else []))
            yield from ((module, alias.name) for alias in node.names)


def test_every_part_has_a_floor() -> None:
    parts = {part_of(name_of(path)) for path in MODULES} - {""}
    assert parts == set(FLOORS)


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_a_part_imports_only_what_stands_below_it(path: Path) -> None:
    part = part_of(name_of(path))
    if not part:
        return  # the public names
    for module, name in imports_of(path):
        other = part_of(module) or name
        if other == "__version__":
            continue
        assert other == part or FLOORS.index(part) < FLOORS.index(other), f"{path.name} imports {name} from {module}"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_no_name_is_both_a_module_and_a_function(path: Path) -> None:
    defined = {
        node.name
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
    }
    assert path.stem not in defined


def test_no_folder_is_crowded() -> None:
    crowded = {
        folder.name: len(list(folder.glob("*.py")))
        for folder in {path.parent for path in MODULES}
        if len(list(folder.glob("*.py"))) > 16
    }
    assert not crowded


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_a_long_module_says_why(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    why = (ast.get_docstring(ast.parse(text)) or "").splitlines()
    long = len(text.splitlines()) > MOST_LINES
    said = any(line.startswith("Long because") for line in why)
    assert said or not long, f"over {MOST_LINES} lines: split it by ideas, or say in its docstring 'Long because ...'"
