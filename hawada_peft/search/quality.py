"""What a shape will cost in quality: predicted for all of them, measured for the ones that matter."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from ..gates.reading import UnitScores
from ..planning.plan import Plan
from ..vanilla.shape import Shape
from .space import SearchSpace


class Quality(Protocol):
    """What the search asks about quality. Losses are in what `meaning` says; 0 is the dense model."""

    @property
    def meaning(self) -> str:
        """What the losses are, for people."""

    def predict(self, space: SearchSpace) -> np.ndarray:
        """The predicted loss over the space: (layers, heads, FFN sizes)."""

    def evaluate(self, shape: Shape) -> float | None:
        """The measured loss of a shape before any recovery; None if it cannot be measured."""

    def plan(self, shape: Shape) -> Plan:
        """What stays at a shape."""


class RankedQuality(Quality, Protocol):
    """A quality that also says what may be cut, and by which scores."""

    @property
    def free(self) -> tuple[str, ...]:
        """What may be cut."""

    @property
    def scores(self) -> UnitScores:
        """Of the units."""
