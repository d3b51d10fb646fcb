"""
The tiny models and the settings of the package's own tests.

The benchmarks are no package: they are on the path.
"""

from __future__ import annotations

import sys
from pathlib import Path

BENCHMARKS = Path(__file__).parents[1]
sys.path[:0] = [str(BENCHMARKS.parent), str(BENCHMARKS.parent / "tests"), str(BENCHMARKS)]

from tests.conftest import (  # noqa: E402
    LM_ROW,
    MIXED_ROW,
    ROWS,
    VISION_ROW,
    Row,
    _seeds,
    assert_same_state,
    build,
    difference,
    inputs_of,
    logits_of,
    pytest_configure,
    state_of,
)

__all__ = [
    "LM_ROW",
    "MIXED_ROW",
    "ROWS",
    "VISION_ROW",
    "Row",
    "_seeds",
    "assert_same_state",
    "build",
    "difference",
    "inputs_of",
    "logits_of",
    "pytest_configure",
    "state_of",
]
