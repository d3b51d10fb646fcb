"""A latency that gates are trained towards, by the method of Lagrange multipliers."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft import PeftModel

from ..errors import InvalidPlanError
from ..gates.reading import expected_sizes, gate_scores
from ..latency.budget import LatencyBudget
from ..latency.effort import Effort
from ..latency.settling import warn_unsettled
from ..latency.table import LatencyTable
from ..planning.reasons import roundings
from ..planning.rounding import Rounding
from ..processes import in_main_process
from ..search.rounds import search
from ..search.space import search_space
from ..search.state import SearchState
from ..search.timed import Timer, check_regime, dense_model, regime_of
from ..vanilla.family import Layout, locate
from ..vanilla.shape import FFN, HEADS, LAYERS, Shape
from .constraint import LatencyConstraint
from .gate_quality import GateQuality

logger = logging.getLogger(__name__)


class LatencyGoal:
    """
    A latency, whatever the shape: the gates find it under a `LatencyConstraint`, and the search at the end only
    rounds.

    Args:
        model (`PeftModel`): with one active adapter, placed by a family row.
        budget (`LatencyBudget`): what the slim model may cost.
        table (`LatencyTable`): measured here.
        rate (`float`): of the ascent.
        anchor_steps (`int`): after how many steps the current shape is timed.
        effort (`Effort`, *optional*): how long shapes are timed, by which clock, and how hard the search at the end
            looks.

    Raises:
        InfeasibleBudgetError: if no shape meets the budget.
        InvalidPlanError: if the residual stream has gates.
        IncompatibleTableError: if the table is for another device, regime or model.
    """

    term = "latency"
    shape: Shape | None = None

    def __init__(
        self,
        model: PeftModel,
        budget: LatencyBudget,
        table: LatencyTable,
        *,
        rate: float = 1.0,
        anchor_steps: int = 50,
        effort: Effort | None = None,
    ) -> None:
        self.model, self.budget, self.anchor_steps = model, budget, anchor_steps
        self.roundings: Sequence[Rounding] = ()
        self.search: Mapping[str, Any] | None = None
        self.base = dense_model(model)
        self.layout: Layout = locate(self.base)
        self.name: str = model.active_adapters[0]
        scores = gate_scores(self.base, self.layout, [self.name])
        axes = {HEADS: scores.heads, FFN: scores.channels, LAYERS: scores.layers}
        if scores.hidden is not None:
            raise InvalidPlanError(
                "gates on 'hidden' cannot be trained under a latency constraint: the table has one hidden size. Leave "
                "them out of the config's `gates`, or let the search choose the shape (constraint='search')"
            )
        self.regime = regime_of(model, budget)
        check_regime(self.base, self.regime)
        self.effort = effort = effort or Effort()
        device_name = effort.clock.device_name(self.regime)
        table.check(regime=self.regime, model=self.layout.fingerprint(), device_name=device_name)
        self.space = search_space(
            self.layout,
            self.regime,
            multiple=table.multiple,
            group_size=scores.group_size,
            free=[axis for axis, values in axes.items() if all(value is not None for value in values)],
        )
        SearchState(self.space, table, budget, effort).check_feasible()
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
        timer = Timer(self.base, self.regime, self.effort.confirming())
        result = search(self.space, self.constraint.table, self._quality(), self.budget, timer, effort=self.effort)
        warn_unsettled(timer.unsettled)
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

    def step(self, step: int) -> None:
        """Let the multiplier climb; every `anchor_steps` the first process times the current shape for all."""
        self.constraint.ascend(self._violation)
        if step % self.anchor_steps == 0:
            self.anchor(*in_main_process(self.measure))

    def measure(self) -> tuple[Shape, float]:
        """The current shape and its milliseconds, timed beside the dense one with random weights."""
        shape = self.current_shape()
        times = Timer(self.base, self.regime, self.effort.glancing())([shape])
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
        return roundings(self.layout, expected, shape, "gates", steps=self.space.steps, rules=rules)

    def _quality(self) -> GateQuality:
        return GateQuality(self.base, self.layout, self.name, self.constraint.table)
