"""What gates are trained towards: a shape, or a latency."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft import PeftModel

from ..gates.reading import axes_of
from ..planning.rounding import Rounding
from ..search.timed import dense_model
from ..vanilla.family import locate
from ..vanilla.shape import Shape
from .penalties import size_penalty

logger = logging.getLogger(__name__)


class Goal(ABC):
    """
    Where the gates are to end, and what draws them there.

    `roundings` says what became of the sizes that were asked for, and `search` how the final shape was searched, for
    JSON, once that is known.
    """

    roundings: Sequence[Rounding] = ()
    search: Mapping[str, Any] | None = None

    @abstractmethod
    def current_shape(self) -> Shape:
        """The legal shape that the gates would get now."""

    @abstractmethod
    def final_shape(self) -> Shape:
        """The shape of the plan that is exported."""

    @abstractmethod
    def penalty(self, progress: float) -> torch.Tensor:
        """
        What draws the gates there: (), differentiable.

        Args:
            progress: of the soft part of training, in (0, 1].
        """

    @abstractmethod
    def step(self) -> None:
        """Called once per optimizer step of the soft part."""

    @abstractmethod
    def figures(self) -> dict[str, float]:
        """For the log."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs, for JSON."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`."""


class ShapeGoal(Goal):
    """
    A fixed shape. Each axis is drawn to its keep ratio by `size_penalty`, against ratios that fall from 1 as training
    proceeds.

    Args:
        model (`PeftModel`): with one active adapter, placed by a family row.
        shape (`Shape`): complete and legal.
        roundings (`Sequence[Rounding]`): what was asked for instead.
    """

    def __init__(self, model: PeftModel, shape: Shape, roundings: Sequence[Rounding] = ()) -> None:
        self.model, self.shape, self.roundings = model, shape, tuple(roundings)
        layout = locate(dense_model(model))
        wanted, dense = shape.complete(layout.full).to_dict(), layout.full.to_dict()
        self._ratios = {name: wanted[name] / dense[name] for name in dense}

    def current_shape(self) -> Shape:
        """The fixed one."""
        return self.shape

    def final_shape(self) -> Shape:
        """The fixed one."""
        return self.shape

    def penalty(self, progress: float) -> torch.Tensor:
        """The sum of the axes' size penalties."""
        penalties = [
            size_penalty([gate.open_probability() for gate in gates], 1 - progress * (1 - self._ratios[name]))
            for name, gates in axes_of(self.model).items()
            if self._ratios[name] < 1
        ]
        return torch.stack(penalties).sum() if penalties else torch.zeros(())

    def step(self) -> None:
        """Nothing changes."""

    def figures(self) -> dict[str, float]:
        """Nothing."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """The shape, and where it came from."""
        return {"shape": self.shape.to_dict(), "roundings": [each.to_dict() for each in self.roundings]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`."""
        asked = [Rounding(**each) for each in state.get("roundings", ())]
        self.__init__(self.model, Shape.from_dict(state["shape"]), asked)  # type: ignore[misc]  # all follows from it
