"""Every script of the benchmarks still finds what it imports: most are run by hand, rarely."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

SCRIPTS = sorted(path.stem for path in Path(__file__).parents[1].glob("*.py"))


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_imports(script):
    module = importlib.import_module(script)
    assert (module.__doc__ or "").strip(), f"{script} says nothing of what it measures"
