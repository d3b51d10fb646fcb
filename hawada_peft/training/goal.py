"""What gates are trained towards: a shape, or a latency."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft import PeftModel

from ..adapters.attach import collect_gates
from ..adapters.base import BLOCK, HIDDEN_UNITS, LAYER, UNITS
from ..adapters.gates import HeadGate, SigmoidGate
from ..adapters.huggingface.family import Layout, locate
from ..adapters.huggingface.shape import Shape
from ..errors import InvalidPlanError
from ..export.find_plan import dense_model, realise_with, regime_of
from ..export.rank import gate_scores
from ..export.reasons import roundings
from ..export.rounding import Rounding
from ..export.search_export import search
from ..export.search_state import Realise, SearchEffort, SearchState
from ..export.space import search_space
from ..latency.budget import LatencyBudget
from ..latency.measure import Effort
from ..latency.table import LatencyTable
from .constraint import LatencyConstraint, expected_sizes
from .gate_quality import GateQuality
from .penalties import size_penalty

logger = logging.getLogger(__name__)

ANCHOR = Effort(min_rounds=5, max_rounds=20, max_seconds=5.0, tolerance=0.01)
"""How long the current shape is timed while training runs."""


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


class LatencyGoal(Goal):
    """
    A latency, whatever the shape: the gates find it under a `LatencyConstraint`, and the search at the end only
    rounds.

    Args:
        model (`PeftModel`): with one active adapter, placed by a family row.
        budget (`LatencyBudget`): what the slim model may cost.
        table (`LatencyTable`): measured here.
        rate (`float`): of the ascent.
        timing (`Effort`, *optional*): how long shapes are timed.
        effort (`SearchEffort`, *optional*): how hard the search at the end looks.

    Raises:
        InfeasibleBudgetError: if no shape meets the budget.
        InvalidPlanError: if the residual stream has gates.
        IncompatibleTableError: if the table is for another device, regime or model.
    """

    def __init__(
        self,
        model: PeftModel,
        budget: LatencyBudget,
        table: LatencyTable,
        *,
        rate: float = 1.0,
        timing: Effort | None = None,
        effort: SearchEffort | None = None,
    ) -> None:
        self.model, self.budget = model, budget
        self.base = dense_model(model)
        self.layout: Layout = locate(self.base)
        self.name: str = model.active_adapters[0]
        scores = gate_scores(self.base, self.layout, [self.name])
        axes = {"heads": scores.heads, "ffn": scores.channels, "layers": scores.layers}
        if scores.hidden is not None:
            raise InvalidPlanError(
                "gates on 'hidden' cannot be trained under a latency constraint: the table has one hidden size. Leave "
                "them out of the config's `gates`, or let the search choose the shape (constraint='search')"
            )
        self.regime = regime_of(model, budget)
        table.check(regime=self.regime, model=self.layout.fingerprint())
        self.space = search_space(
            self.base,
            self.layout,
            self.regime,
            multiple=table.multiple,
            group_size=scores.group_size,
            free=[axis for axis, values in axes.items() if all(value is not None for value in values)],
        )
        self.timing, self.effort = timing, effort
        SearchState(self.space, table, budget, effort or SearchEffort()).check_feasible()
        self.constraint = LatencyConstraint(table, budget.limit_ms(table.dense_ms), rate=rate)
        self._violation = 0.0

    def current_shape(self) -> Shape:
        """The legal shape nearest to what the gates expect."""
        return self._quality().nearest(self.space)

    def final_shape(self) -> Shape:
        """
        The shape that cuts least of what is open, among those whose measured latency meets the budget.

        Raises:
            InfeasibleBudgetError: if none does.
        """
        realise = self._realise(self.timing)
        result = search(self.space, self.constraint.table, self._quality(), self.budget, realise, effort=self.effort)
        self.constraint.measured_ms = self.constraint.table.dense_ms / result.speedup  # as in `measure`
        self.search = result.to_dict()
        self.roundings = self._roundings(result.best.shape)
        return result.best.shape

    def penalty(self, progress: float) -> torch.Tensor:
        """The constraint's two terms."""
        estimate = self.constraint.estimate(expected_sizes(self.base, self.layout, self.name))
        violation = self.constraint.violation(estimate, progress)
        self._violation = float(violation.detach())
        return self.constraint.penalty(violation)

    def step(self) -> None:
        """Let the multiplier climb."""
        self.constraint.ascend(self._violation)

    def measure(self) -> tuple[Shape, float]:
        """The current shape and its milliseconds, timed beside the dense one with random weights."""
        shape = self.current_shape()
        times = self._realise(self.timing or ANCHOR)([shape])
        measured = self.constraint.table.dense_ms * times[shape].median_ms / times[self.layout.dense].median_ms
        logger.info("measured %.3f ms for %s", measured, shape.to_dict())
        return shape, measured

    def anchor(self, shape: Shape, measured_ms: float) -> None:
        """Take up such a measurement."""
        self.constraint.anchor(shape, measured_ms)

    def figures(self) -> dict[str, float]:
        """The estimate, the limit, the multiplier, and the last measurement."""
        with torch.no_grad():
            estimate = self.constraint.estimate(expected_sizes(self.base, self.layout, self.name))
        figures = {
            "estimate_ms": float(estimate),
            "limit_ms": self.constraint.limit_ms,
            "multiplier": self.constraint.multiplier,
        }
        if self.constraint.measured_ms is not None:
            figures["measured_ms"] = self.constraint.measured_ms
        return figures

    def state_dict(self) -> dict[str, Any]:
        """The constraint's."""
        return {"constraint": self.constraint.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The constraint's."""
        self.constraint = LatencyConstraint.from_state_dict(state["constraint"])

    def _roundings(self, shape: Shape) -> tuple[Rounding, ...]:
        quality = self._quality()
        expected = dict(zip(self.layout.dense.sizes(), (float(size) for size in quality.sizes.mean()), strict=True))
        rules = {
            name: "the nearest legal size"
            if size == shape.to_dict()[name]
            else f"the nearest legal size was {size}; of the shapes whose measured latency meets the budget, this one "
            "cuts least of what is open"
            for name, size in quality.nearest(self.space).to_dict().items()
        }
        return roundings(self.base, self.layout, expected, shape, "gates", steps=self.space.steps, rules=rules)

    def _quality(self) -> GateQuality:
        return GateQuality(self.base, self.layout, self.name, self.constraint.table)

    def _realise(self, timing: Effort | None) -> Realise:
        return realise_with(self.base, self.regime, timing=timing)


def axes_of(model: PeftModel) -> dict[str, list[SigmoidGate]]:
    """The active adapter's gates by the size that they gate."""
    axes: dict[str, list[SigmoidGate]] = {}
    names = {HIDDEN_UNITS: "hidden_size", BLOCK: "num_hidden_layers", LAYER: "num_hidden_layers"}
    for name, gate in collect_gates(model).items():
        slot, adapter = name.split(".")[-2:]
        if adapter in model.active_adapters:
            width = "num_attention_heads" if isinstance(gate, HeadGate) else "intermediate_size"
            axes.setdefault(width if slot == UNITS else names[slot], []).append(gate)
    return axes
