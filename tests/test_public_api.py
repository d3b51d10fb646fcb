"""The public names: few, documented, and their examples run."""

from __future__ import annotations

import dataclasses
import doctest
import importlib
import inspect
import pkgutil
import re
from pathlib import Path

import peft
import pytest
import torch
from conftest import LM_ROW, build

import hawada_peft

ROOT = Path(__file__).parents[1]
MODULES = [hawada_peft] + [
    importlib.import_module(found.name)
    for found in pkgutil.walk_packages(hawada_peft.__path__, "hawada_peft.")
    if not found.name.endswith("__main__")
]
EXAMPLES = [
    test for module in MODULES for test in doctest.DocTestFinder(exclude_empty=True).find(module) if test.examples
]
FOLDERS = [module for module in MODULES if hasattr(module, "__path__") and hasattr(module, "__all__")]
SEED = {
    "": (
        "attach_adapters",
        "Shape",
        "Plan",
        "init_gates",
        "find_plan",
        "save_slim",
        "slim_checkpoint",
        "collect_gates",
    ),
    "gates": ("SigmoidGate", "AttentionHeadAdapter", "attach_adapters", "is_attention_layer", "is_ffn_layer"),
    "distil": ("get_student_logits", "get_teacher_logits", "recover"),
    "surgery": ("slice_linear", "slice_embedding", "slim"),
}
"""Names that have always been there, and where."""


def test_names_exist_once_and_are_few() -> None:
    for module in FOLDERS:
        assert len(module.__all__) == len(set(module.__all__)), module.__name__
        assert [name for name in module.__all__ if not hasattr(module, name)] == [], module.__name__
    assert len(hawada_peft.__all__) <= 30


def test_names_that_have_always_been_there_stay() -> None:
    for folder, names in SEED.items():
        module = importlib.import_module(f"hawada_peft.{folder}".rstrip("."))
        assert set(names) <= set(module.__all__), folder


def test_names_are_mentioned_in_the_docs() -> None:
    text = "\n".join(path.read_text() for path in [*ROOT.glob("docs/**/*.md"), ROOT / "README.md"])
    assert [name for name in hawada_peft.__all__ if not re.search(rf"\b{name}\b", text)] == []


def test_docstrings_name_every_field() -> None:
    for module in FOLDERS:
        for cls in (getattr(module, name) for name in module.__all__):
            if inspect.isclass(cls) and dataclasses.is_dataclass(cls):
                own = vars(cls).get("__annotations__", {})
                fields = [field.name for field in dataclasses.fields(cls) if field.name in own]
                assert [name for name in fields if name not in (cls.__doc__ or "")] == [], cls


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.name)
def test_example_runs(example: doctest.DocTest) -> None:
    public = {name: getattr(module, name) for module in [*FOLDERS, hawada_peft] for name in module.__all__}
    example.globs |= public | {"torch": torch, "get_peft_model": peft.get_peft_model, "base": build(LM_ROW)}
    assert doctest.DocTestRunner(verbose=False).run(example, clear_globs=False).failed == 0


def test_version_is_that_of_the_metadata() -> None:
    declared = re.search(r"^version = (.+)$", (ROOT / "setup.cfg").read_text(), re.MULTILINE)
    assert declared
    assert hawada_peft.__version__ == declared[1]


def test_package_is_typed() -> None:
    assert (Path(hawada_peft.__file__).parent / "py.typed").exists()
