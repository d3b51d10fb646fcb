"""A race without models: losses obey a law."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from hawada_peft import Plan, Shape
from hawada_peft.race import Entrant, Race, RaceRecord

DENSE = Shape(4, 2, 32, 8)
RACE = Race(plans=5, preparations=("none", "least squares", "least squares, close", "magnitude"))
LOSSES = {0: 1.0, 1: 0.8, 2: 0.9, 3: 1.2, 4: 1.1}
"""By the first layer that goes."""


def entrant(layer: int, preparation: str = "none", neighbour: bool = False) -> Entrant:
    full = Plan.keep_all(DENSE)
    kept = tuple(index for index in range(8) if index not in (layer, layer + 1))
    plan = replace(full, layers=kept, heads=full.heads[:6], channels=full.channels[:6])
    return Entrant(plan, "runs of layers", preparation, 6.0, 0.5, neighbour)


def record_of(race: Race, path: Path | None = None, steps: float = 240) -> RaceRecord:
    entrants = [*map(entrant, LOSSES), entrant(6, neighbour=True)]
    lengths = race.lengths(len(LOSSES), len(race.preparations) - 1, 1, steps)
    return RaceRecord(race.settings(), entrants, list(race.preparations), lengths, path=path)


def loss_of(one: Entrant, rung: int, steps: int) -> float:
    """Falls with steps; least squares are better at first and worse in the end."""
    first = next(layer for layer in range(8) if layer not in one.plan.layers)
    bonus = {"none": 0.0, "least squares": 0.3 - 0.4 * rung, "least squares, close": 0.1, "magnitude": -0.1}
    return LOSSES.get(first, 0.1) - bonus[one.preparation] - 0.001 * steps


class Trials:
    """Counts the runs, and is killed before one."""

    def __init__(self, killed_at: int | None = None, loss: Callable[[Entrant, int, int], float] = loss_of) -> None:
        self.killed_at, self.loss = killed_at, loss
        self.seen: list[tuple[str, int, int]] = []

    def __call__(self, one: Entrant, rung: int, steps: int) -> float:
        if len(self.seen) == self.killed_at:
            raise KeyboardInterrupt
        self.seen.append((one.key, rung, steps))
        return self.loss(one, rung, steps)
