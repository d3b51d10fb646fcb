"""What gates are trained towards: a shape, or a latency."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, cast

import torch
from peft import PeftModel

from ..gates.reading import open_probabilities
from ..planning.rounding import Rounding
from ..search.timed import dense_model
from ..vanilla.family import locate
from ..vanilla.shape import Shape
from .penalties import size_penalty


class Goal(Protocol):
    """
    Where the gates are to end, and what draws them there.

    `term` is the name of its penalty in the log. `shape` is known where the gates only choose which units stay.
    `roundings` says what became of the sizes that were asked for, and `search` how the final shape was searched, for
    JSON, once that is known.
    """

    term: str
    shape: Shape | None
    roundings: Sequence[Rounding]
    search: Mapping[str, Any] | None

    def current_shape(self) -> Shape:
        """The legal shape that the gates would get now."""

    def final_shape(self) -> Shape:
        """The shape of the plan that is exported."""

    def penalty(self, progress: float) -> torch.Tensor:
        """
        What draws the gates there: (), differentiable.

        Args:
            progress: of the soft part of training, in (0, 1].
        """

    def step(self, step: int) -> None:
        """Called in every process after each optimizer step of the soft part, with the steps done."""

    def figures(self) -> dict[str, float]:
        """For the log."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs, for JSON."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`."""


class ShapeGoal:
    """
    A fixed shape. Each axis is drawn to its keep ratio by `size_penalty`, against ratios that fall from 1 as training
    proceeds.

    Args:
        model (`PeftModel`): with one active adapter, placed by a family row.
        shape (`Shape`): complete and legal.
        roundings (`Sequence[Rounding]`): what was asked for instead.
    """

    term = "size"
    search: Mapping[str, Any] | None = None

    def __init__(self, model: PeftModel, shape: Shape, roundings: Sequence[Rounding] = ()) -> None:
        self.model, self.layout = model, locate(dense_model(model))
        self.shape: Shape | None = shape
        self.roundings: Sequence[Rounding] = tuple(roundings)

    def current_shape(self) -> Shape:
        """The fixed one."""
        return cast(Shape, self.shape)

    def final_shape(self) -> Shape:
        """The fixed one."""
        return cast(Shape, self.shape)

    def penalty(self, progress: float) -> torch.Tensor:
        """The sum of the axes' size penalties."""
        wanted, dense = self.final_shape().complete(self.layout.full).to_dict(), self.layout.full.to_dict()
        penalties = [
            size_penalty(probabilities, 1 - progress * (1 - wanted[name] / dense[name]))
            for name, probabilities in open_probabilities(self.model, self.layout).items()
            if wanted[name] < dense[name]
        ]
        return torch.stack(penalties).sum() if penalties else torch.zeros(())

    def step(self, step: int) -> None:
        """Nothing changes."""

    def figures(self) -> dict[str, float]:
        """Nothing."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """The shape, and where it came from."""
        return {"shape": self.final_shape().to_dict(), "roundings": [each.to_dict() for each in self.roundings]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`."""
        self.shape = Shape.from_dict(state["shape"])
        self.roundings = tuple(Rounding(**each) for each in state.get("roundings", ()))
