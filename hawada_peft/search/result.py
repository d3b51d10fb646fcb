"""What a search returns: the shape, and all that it was chosen from."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from ..errors import HawAdaError
from ..latency.budget import LatencyBudget
from ..latency.table import LatencyTable
from ..planning.cut import BESIDE
from ..planning.plan import Plan
from ..vanilla.shape import Shape

FORMAT = 1
"""Of a file that holds a search."""

MOST_POINTS = 80
"""Candidates in the figures of a search at most: all that were timed, and the frontier thinned evenly."""


@dataclass(frozen=True)
class Candidate:
    """
    A shape and what is known about it.

    Args:
        shape (`Shape`): the sizes; where several towers are searched, those of the first.
        estimate_ms (`float`): by the table, corrected by all that was timed.
        predicted_loss (`float`): nats per prediction over the dense model's, before any recovery, corrected likewise.
        parameters (`int`): of the slim model.
        memory (`float`): bytes of its weights and KV cache.
        measured_ms (`float`, *optional*): on the scale of `SearchResult.dense_ms`.
        measured_loss (`float`, *optional*): of the refitted slim model, or by closing the gates of what goes.
        expected_ms, expected_loss (`float`, *optional*): what was expected before it was timed and evaluated.
        rejected (`str`, *optional*): why another shape was chosen; None for the chosen one.
        beside (`tuple[tuple[str, Shape], ...]`): further towers that are searched, each with its sizes.
    """

    shape: Shape
    estimate_ms: float
    predicted_loss: float
    parameters: int
    memory: float
    measured_ms: float | None = None
    measured_loss: float | None = None
    expected_ms: float | None = None
    expected_loss: float | None = None
    rejected: str | None = None
    beside: tuple[tuple[str, Shape], ...] = ()

    @property
    def sizes(self) -> tuple[Shape, ...]:
        """Of all towers that are searched."""
        return (self.shape, *(shape for _, shape in self.beside))

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        beside = {tower: shape.to_dict() for tower, shape in self.beside}
        return asdict(self) | {"shape": self.shape.to_dict(), BESIDE: beside}

    def figures(self) -> dict[str, Any]:
        """For a report: as `to_dict`, numbers to six digits."""
        return {name: _short(value) for name, value in self.to_dict().items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Candidate:
        """The inverse of `to_dict`."""
        beside = tuple((tower, Shape.from_dict(sizes)) for tower, sizes in data[BESIDE].items())
        return cls(**{**data, "shape": Shape.from_dict(data["shape"]), BESIDE: beside})


@dataclass(frozen=True)
class SearchResult:
    """
    What the search found.

    Args:
        budget (`LatencyBudget`): what was asked for.
        best (`Candidate`): the shape; its latency is measured, not estimated.
        plan (`Plan`): what of the model stays at that shape.
        dense_ms (`float`): the dense model, timed side by side with `best`.
        limit_ms (`float`): what the budget allows on that scale; infinite if it does not limit latency.
        frontier (`tuple[Candidate, ...]`): for every latency the shape of least predicted loss, slowest first;
            none of fewer layers than the budget may need.
        measured (`tuple[Candidate, ...]`): every shape that was timed.
        table (`LatencyTable`): of the dense hidden size, corrected by all of it that was timed; of several towers that
            of the first.
        rounds (`int`): rounds it took.
        margin (`float`): how far below the budget it stayed: `Effort.margin`.
        shapes (`int`): how many there were to choose from.
        steps (`dict[str, str]`): by size, which values were there to choose from, and why.
        loss (`str`): what the losses are: `Quality.meaning`.
        depth (`dict`): what dropping each layer costs: `MaskedQuality.depth`.
    """

    budget: LatencyBudget
    best: Candidate
    plan: Plan
    dense_ms: float
    limit_ms: float
    frontier: tuple[Candidate, ...]
    measured: tuple[Candidate, ...]
    table: LatencyTable
    rounds: int
    margin: float = 0.0
    shapes: int = 0
    steps: Mapping[str, str] = field(default_factory=dict)
    loss: str = ""
    depth: Mapping[str, Any] = field(default_factory=dict)

    @property
    def ms(self) -> float:
        """The best shape's measured latency in milliseconds."""
        return self.best.estimate_ms if self.best.measured_ms is None else self.best.measured_ms

    @property
    def speedup(self) -> float:
        """The dense model's latency over the best shape's, both measured."""
        return self.dense_ms / self.ms

    def to_dict(self) -> dict[str, Any]:
        """All of it, for JSON; without the file of the table."""
        limit_ms = self.limit_ms if math.isfinite(self.limit_ms) else None
        return {each.name: getattr(self, each.name) for each in fields(self)} | {
            "budget": asdict(self.budget),
            "best": self.best.to_dict(),
            "plan": self.plan.to_dict(),
            "limit_ms": limit_ms,
            "frontier": [candidate.to_dict() for candidate in self.frontier],
            "measured": [candidate.to_dict() for candidate in self.measured],
            "table": self.table.to_dict(),
            "steps": dict(self.steps),
            "depth": dict(self.depth),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SearchResult:
        """
        The inverse of `to_dict`.

        Raises:
            HawAdaError: if this is not a search, or its budget, plan or table is damaged.
        """
        known = {each.name for each in fields(cls)}
        if not isinstance(data, Mapping) or set(data) != known:
            found = sorted(data) if isinstance(data, Mapping) else type(data).__name__
            raise HawAdaError(f"a search is an object of {sorted(known)}, got {found}; search again")
        try:
            return cls(
                **{
                    **data,
                    "budget": LatencyBudget(**data["budget"]),
                    "best": Candidate.from_dict(data["best"]),
                    "plan": Plan.from_dict(data["plan"]),
                    "limit_ms": math.inf if data["limit_ms"] is None else data["limit_ms"],
                    "frontier": tuple(Candidate.from_dict(each) for each in data["frontier"]),
                    "measured": tuple(Candidate.from_dict(each) for each in data["measured"]),
                    "table": LatencyTable.from_dict(data["table"]),
                }
            )
        except (TypeError, KeyError) as error:
            raise HawAdaError(f"the search is damaged: {error}; search again") from None

    def parts(self) -> dict[str, dict[str, float]]:
        """
        Where the milliseconds of the dense model and of the best shape go, by the table; empty for other widths, and
        where several towers are searched.
        """
        best, sizes = self.best.shape, self.table.base_sizes
        narrower = any(getattr(best, name) not in (None, sizes[name]) for name in ("hidden_size", "head_dim"))
        if self.best.beside or narrower:
            return {}
        shapes = {"dense": self.table.dense, "slim": self.best.shape}
        found = {name: self.table.parts(shape) for name, shape in shapes.items()}
        return {name: {part: _short(ms) for part, ms in each.items()} for name, each in found.items()}

    def figures(self) -> dict[str, Any]:
        """
        For a report, without the plan and the table: at most `MOST_POINTS` candidates under `points`, `frontier` says
        which of them no other beats.
        """
        on_frontier = {candidate.sizes for candidate in self.frontier}
        timed = {each.sizes: each for each in self.measured if each.sizes != self.best.sizes}
        timed[self.best.sizes] = self.best  # the last one: what is too many goes from the front
        further = [candidate for candidate in self.frontier if candidate.sizes not in timed]
        room = max(0, MOST_POINTS - len(timed))
        if len(further) > room:
            further = [further[round(place * (len(further) - 1) / max(1, room - 1))] for place in range(room)]
        points = [*list(timed.values())[-MOST_POINTS:], *further]
        return {
            "budget": str(self.budget),
            "limit_ms": self.limit_ms if math.isfinite(self.limit_ms) else None,
            "margin": self.margin,
            "dense_ms": self.dense_ms,
            "chosen_ms": self.ms,
            "regime": self.table.regime.to_dict(),
            "device": self.table.device_name,
            "estimate_errors": dict(self.table.errors),
            "multiple": self.table.multiple,
            "rounds": self.rounds,
            "shapes": self.shapes,
            "steps": dict(self.steps),
            "loss": self.loss,
            "parts": self.parts(),
            "depth": _short(self.depth),
            "points": [point.figures() | {"frontier": point.sizes in on_frontier} for point in points],
        }

    def __str__(self) -> str:
        loss = self.best.predicted_loss if self.best.measured_loss is None else self.best.measured_loss
        sizes = "; ".join(str(shape.to_dict()) for shape in self.best.sizes)
        return (
            f"{sizes}: {self.ms:.3f} ms measured, budget {self.limit_ms:.3f} ms, "
            f"dense {self.dense_ms:.3f} ms ({self.speedup:.2f}x); {loss:.4f} nats before recovery; "
            f"{self.best.parameters:,} parameters"
        )


def _short(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _short(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_short(each) for each in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value
