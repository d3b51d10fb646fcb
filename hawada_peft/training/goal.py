"""What gates are trained towards: sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft import PeftModel

from ..gates.reading import open_probabilities
from ..planning.rounding import Rounding
from ..planning.towers import Sizes, shapes_of
from ..search.timed import dense_model
from ..vanilla.family import locate_all
from ..vanilla.shape import Shape
from .penalties import size_penalty


class Goal:
    """
    Fixed sizes. Each axis is drawn to its keep ratio by `size_penalty`, against ratios that fall from 1 as training
    proceeds.

    Args:
        model (`PeftModel`): with one active adapter, placed by a family row.
        target (`Shape` or `dict`): complete and legal; of several towers a `Shape` for each (`Plan.target`).
        roundings (`Mapping[str, Sequence[Rounding]]`): what was asked for instead, by the tower.
    """

    def __init__(
        self, model: PeftModel, target: Sizes, roundings: Mapping[str, Sequence[Rounding]] | None = None
    ) -> None:
        self.model, self.layouts = model, locate_all(dense_model(model))
        self.target = target
        self.roundings: Mapping[str, Sequence[Rounding]] = dict(roundings or {})

    def penalty(self, progress: float) -> torch.Tensor:
        """
        What draws the gates there, the sum of the axes' size penalties: (), differentiable.

        Args:
            progress: of the soft part of training, in (0, 1].
        """
        shapes = shapes_of(self.layouts, self.target)
        penalties = []
        for layout in self.layouts:
            wanted, dense = shapes[layout.tower].complete(layout.full).to_dict(), layout.full.to_dict()
            penalties += [
                size_penalty(probabilities, 1 - progress * (1 - wanted[name] / dense[name]))
                for name, probabilities in open_probabilities(self.model, layout).items()
                if wanted[name] < dense[name]
            ]
        return torch.stack(penalties).sum() if penalties else torch.zeros(())

    def state_dict(self) -> dict[str, Any]:
        """The sizes, and where they came from."""
        shapes = shapes_of(self.layouts, self.target)
        return {
            "shapes": {tower: shape.to_dict() for tower, shape in shapes.items()},
            "roundings": {tower: [each.to_dict() for each in some] for tower, some in self.roundings.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`."""
        self.target = target_of(state)
        self.roundings = {
            tower: tuple(Rounding(**each) for each in some) for tower, some in state.get("roundings", {}).items()
        }


def target_of(state: Mapping[str, Any]) -> Sizes:
    """The sizes in what `Goal.state_dict` gave."""
    shapes = {tower: Shape.from_dict(sizes) for tower, sizes in state["shapes"].items()}
    if not shapes:
        raise KeyError("shapes")
    return shapes if len(shapes) > 1 else next(iter(shapes.values()))
