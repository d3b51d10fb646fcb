"""The latency constraint: expected sizes from gates, an estimate from the table, a multiplier by dual ascent."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..gates.reading import ExpectedSizes
from ..latency.table import LatencyTable
from ..vanilla.shape import Shape


class LatencyConstraint:
    """
    An augmented Lagrangian of the estimated latency: `multiplier * v + curvature / 2 * relu(v)^2` with the violation
    `v = estimate / limit - 1`. The multiplier climbs by `rate * v` per step and stays at least 0.

    The limit falls from the dense latency to the one asked for as training proceeds. What real measurements differ
    from the table is followed by a moving average.

    References:
        Nocedal, Wright, "Numerical Optimization" (2006), chapter 17; Xia et al., "Sheared LLaMA" (2023), equation 2.

    Args:
        table (`LatencyTable`): milliseconds per size.
        limit_ms (`float`): milliseconds that the slim model may take.
        rate (`float`): of the ascent.
        curvature (`float`): of the quadratic term.
        momentum (`float`): how much of a new measurement the moving average takes up.
    """

    def __init__(
        self,
        table: LatencyTable,
        limit_ms: float,
        *,
        rate: float = 1.0,
        curvature: float = 10.0,
        momentum: float = 0.5,
    ) -> None:
        self.table, self.limit_ms = table, limit_ms
        self.rate, self.curvature, self.momentum = rate, curvature, momentum
        self.multiplier = 0.0
        self.scale = 1.0
        self.measured_ms: float | None = None

    def estimate(self, sizes: ExpectedSizes) -> torch.Tensor:
        """Milliseconds, (), float64, differentiable."""
        raw = self.table.expected(heads=sizes.heads, kv_groups=sizes.kv_groups, ffn=sizes.ffn, layers=sizes.layers)
        return self.scale * raw

    def violation(self, estimate: torch.Tensor, progress: float) -> torch.Tensor:
        """
        What the estimate exceeds the limit by, relative to it: ().

        Args:
            estimate: milliseconds.
            progress: of the soft part, from 0 to 1.
        """
        dense = self.table.dense_ms * self.scale
        limit = dense + progress * (min(self.limit_ms, dense) - dense)
        return estimate / limit - 1

    def penalty(self, violation: torch.Tensor) -> torch.Tensor:
        """The two terms, ()."""
        return self.multiplier * violation + self.curvature / 2 * torch.relu(violation).square()

    def ascend(self, violation: float) -> None:
        """One step of dual ascent."""
        self.multiplier = max(0.0, self.multiplier + self.rate * violation)

    def anchor(self, shape: Shape, measured_ms: float) -> None:
        """Take up a measurement of a shape."""
        ratio = measured_ms / self.table.estimate(shape)
        self.scale += self.momentum * (ratio - self.scale)
        self.measured_ms = measured_ms

    def state_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        names = ("limit_ms", "rate", "curvature", "momentum", "multiplier", "scale", "measured_ms")
        return {"table": self.table.to_dict(), **{name: getattr(self, name) for name in names}}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> LatencyConstraint:
        """The inverse of `state_dict`."""
        options = {name: state[name] for name in ("rate", "curvature", "momentum")}
        constraint = cls(LatencyTable.from_dict(state["table"]), state["limit_ms"], **options)
        for name in ("multiplier", "scale", "measured_ms"):
            setattr(constraint, name, state[name])
        return constraint
