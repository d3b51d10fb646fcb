"""The public names: documented, and their examples run."""

from __future__ import annotations

import dataclasses
import doctest
import inspect
import re
import sys
from pathlib import Path
from types import ModuleType

import peft
import pytest
import torch
from conftest import LM_ROW, build

import hawada_peft

ROOT = Path(__file__).parents[1]
MODULES = [module for name, module in sorted(sys.modules.items()) if re.match(r"hawada_peft(\.|$)", name)]
EXAMPLES = [
    test for module in MODULES for test in doctest.DocTestFinder(exclude_empty=True).find(module) if test.examples
]
CLASSES = [getattr(hawada_peft, name) for name in hawada_peft.__all__ if inspect.isclass(getattr(hawada_peft, name))]
RECORDS = [cls for cls in CLASSES if dataclasses.is_dataclass(cls)]


def documentation() -> str:
    return "\n".join(path.read_text() for path in [*ROOT.glob("docs/**/*.md"), ROOT / "README.md"])


def test_names_are_sorted_unique_and_exist() -> None:
    assert hawada_peft.__all__ == sorted(set(hawada_peft.__all__))
    assert [name for name in hawada_peft.__all__ if not hasattr(hawada_peft, name)] == []


@pytest.mark.parametrize("name", hawada_peft.__all__)
def test_name_has_a_docstring(name: str) -> None:
    assert inspect.getdoc(getattr(hawada_peft, name))


@pytest.mark.parametrize("name", hawada_peft.__all__)
def test_name_is_mentioned_in_the_docs(name: str) -> None:
    assert re.search(rf"\b{name}\b", documentation())


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_public_methods_have_docstrings(cls: type) -> None:
    mine = {
        name: member
        for name, member in vars(cls).items()
        if not name.startswith("_") and (inspect.isfunction(member) or isinstance(member, property | classmethod))
    }
    assert [name for name, member in mine.items() if not member.__doc__] == []


@pytest.mark.parametrize(
    "cls",
    [pytest.param(cls, id=cls.__name__) for cls in RECORDS],
)
def test_docstring_names_every_field(cls: type) -> None:
    own = [field.name for field in dataclasses.fields(cls) if field.name in vars(cls).get("__annotations__", {})]
    assert [name for name in own if name not in cls.__doc__] == []


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_module_has_a_docstring_and_types(module: ModuleType) -> None:
    assert module.__doc__
    functions = [f for f in vars(module).values() if inspect.isfunction(f) and f.__module__ == module.__name__]
    assert [f.__qualname__ for f in functions if "return" not in f.__annotations__] == []


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.name)
def test_example_runs(example: doctest.DocTest) -> None:
    public = {name: getattr(hawada_peft, name) for name in hawada_peft.__all__}
    example.globs |= public | {"torch": torch, "get_peft_model": peft.get_peft_model, "base": build(LM_ROW)}
    assert doctest.DocTestRunner(verbose=False).run(example, clear_globs=False).failed == 0


def test_version_is_that_of_the_metadata() -> None:
    declared = re.search(r"^version = (.+)$", (ROOT / "setup.cfg").read_text(), re.MULTILINE)
    assert declared
    assert hawada_peft.__version__ == declared[1]


def test_package_is_typed() -> None:
    assert (Path(hawada_peft.__file__).parent / "py.typed").exists()
