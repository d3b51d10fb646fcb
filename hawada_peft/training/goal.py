"""What gates are trained towards: a shape."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft import PeftModel

from ..gates.reading import open_probabilities
from ..planning.rounding import Rounding
from ..search.timed import dense_model
from ..vanilla.family import locate
from ..vanilla.shape import Shape
from .penalties import size_penalty


class Goal:
    """
    A fixed shape. Each axis is drawn to its keep ratio by `size_penalty`, against ratios that fall from 1 as training
    proceeds.

    Args:
        model (`PeftModel`): with one active adapter, placed by a family row.
        shape (`Shape`): complete and legal.
        roundings (`Sequence[Rounding]`): what was asked for instead.
    """

    def __init__(self, model: PeftModel, shape: Shape, roundings: Sequence[Rounding] = ()) -> None:
        self.model, self.layout = model, locate(dense_model(model))
        self.shape = shape
        self.roundings: Sequence[Rounding] = tuple(roundings)

    def penalty(self, progress: float) -> torch.Tensor:
        """
        What draws the gates there, the sum of the axes' size penalties: (), differentiable.

        Args:
            progress: of the soft part of training, in (0, 1].
        """
        wanted, dense = self.shape.complete(self.layout.full).to_dict(), self.layout.full.to_dict()
        penalties = [
            size_penalty(probabilities, 1 - progress * (1 - wanted[name] / dense[name]))
            for name, probabilities in open_probabilities(self.model, self.layout).items()
            if wanted[name] < dense[name]
        ]
        return torch.stack(penalties).sum() if penalties else torch.zeros(())

    def state_dict(self) -> dict[str, Any]:
        """The shape, and where it came from."""
        return {"shape": self.shape.to_dict(), "roundings": [each.to_dict() for each in self.roundings]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`."""
        self.shape = Shape.from_dict(state["shape"])
        self.roundings = tuple(Rounding(**each) for each in state.get("roundings", ()))
