"""How the tensors of a dense model become those of a slim one, whichever of its towers a plan cuts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ..planning.plan import Plan
from ..vanilla.family import Layout, locate, locate_stream, mark, together
from ..vanilla.resize import edit_config
from ..vanilla.shape import SliceRule
from .axes import cut_by, find_axes
from .source import rows_of


@dataclass(frozen=True)
class Cutting:
    """
    The towers of one model that a plan cuts. Their layers are disjoint, and so are the config fields of their sizes.

    Args:
        towers: of each its layout in the dense model, and its own plan.
    """

    towers: Sequence[tuple[Layout, Plan]]

    @cached_property
    def rules(self) -> tuple[Mapping[str, tuple[SliceRule, ...]], ...]:
        """
        Of each tower how parameters are made of units, as `find_axes` gives them.

        Raises:
            UnsupportedModelError: as `find_axes`.
        """
        return tuple(
            find_axes(layout, hidden=plan.hidden is not None and not plan.rotated, cut=cut_by(plan))
            for layout, plan in self.towers
        )

    @property
    def model_class(self) -> type[PreTrainedModel]:
        """The model's class."""
        return self.towers[0][0].model_class

    def config(self) -> PreTrainedConfig:
        """A new config of the same class with the sizes of the plan."""
        config = self.towers[0][0].config
        for layout, plan in self.towers:
            config = edit_config(replace(layout, config=config), plan.shape, layers=plan.layers)
        return config

    def source(self, name: str) -> str:
        """The dense name of a slim tensor or module."""
        _, at, short = self._place(name)
        if at < 0:
            return name
        layout, plan = self.towers[self._tower(name)]
        return f"{layout.stack}.{plan.layers[at]}.{short}"

    def rows(self, name: str) -> dict[int, torch.Tensor]:
        """What stays of the dense tensor that a slim one is made of: the indices along each dimension that is cut."""
        tower, at, short = self._place(name)
        own = [] if at < 0 else [(tower, rule) for rule in self.rules[tower].get(short, ())]
        # What is in no layer, or holds units of another module than its layer's ends, goes by its full name.
        source = f".{self.source(name)}"
        full = [(each, rule) for each, rules in enumerate(self.rules) for rule in rules.get(source, ())]
        return {rule.dim: rows_of(rule, *self.towers[each], at) for each, rule in own + full}

    def mark(self, slim: PreTrainedModel) -> None:
        """Have `locate` find these towers in the slim model."""
        for number, (layout, plan) in enumerate(self.towers):
            mark(slim, layout, plan.layers, beside=number > 0)

    def _tower(self, name: str) -> int:
        """Which tower's layers a tensor is in; -1: none's."""
        inside = [number for number, (layout, _) in enumerate(self.towers) if name.startswith(f"{layout.stack}.")]
        return inside[0] if inside else -1

    def _place(self, name: str) -> tuple[int, int, str]:
        """The tower of a slim tensor, its layer's position in the plan (-1: outside), its name in `find_axes`."""
        tower = self._tower(name)
        if tower < 0:
            return tower, -1, f".{name}"
        index, _, short = name.removeprefix(f"{self.towers[tower][0].stack}.").partition(".")
        return tower, int(index), short


def towers_for(model: PreTrainedModel, plan: Plan, known: Layout | None = None) -> list[tuple[Layout, Plan]]:
    """
    The towers that a plan cuts, each with its part. Arguments as in `layout_for`.

    Raises:
        UnsupportedModelError: as `locate`.
    """
    layouts = together([layout_for(model, part, known) for part in plan.parts])
    return list(zip(layouts, plan.parts, strict=True))


def layout_for(model: PreTrainedModel, plan: Plan, known: Layout | None = None) -> Layout:
    """
    The layout of the tower that a plan of one is about, as what it cuts needs it: the known one, where it is that.

    Raises:
        UnsupportedModelError: as `locate`.
    """
    if plan.hidden is not None and not plan.rotated:
        return locate_stream(model, plan.tower or None)
    return known if known is not None and plan.tower in ("", known.tower) else locate(model, plan.tower or None)
