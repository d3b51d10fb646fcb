"""
The tiny models, the settings and the toy machine of the package's own tests.

The benchmarks are no package: they are on the path. No budget here is met or missed by how fast this machine is.
"""

from __future__ import annotations

import sys
from pathlib import Path

BENCHMARKS = Path(__file__).parents[1]
sys.path[:0] = [str(BENCHMARKS.parent), str(BENCHMARKS.parent / "tests"), str(BENCHMARKS)]

import toys  # noqa: E402

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

toys.install()
