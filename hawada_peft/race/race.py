"""
A race of plans and preparations by successive halving: what recovers best goes on.

Long because its options are explained and checked where they stand.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from ..errors import HawAdaError
from ..latency.budget import LatencyBudget
from ..latency.effort import Effort
from ..search.result import SearchResult
from .candidates import Candidate
from .fits import Sizes
from .preparations import PREPARATIONS
from .record import Entrant, RaceRecord, Run

logger = logging.getLogger(__name__)

LEAST = 8
"""Steps of a run in the first rung; shorter ones decide nothing."""

ONWARD = ("continued", "anew")
Trial = Callable[[Entrant, int, int], float]
"""Trains an entrant's model for a rung and a number of steps, and returns its held-out loss; NaN if it cannot."""


@dataclass(frozen=True)
class Race:
    """
    How plans race. What looks best when it is cut is often not what recovers best; a short recovery tells.

    Of a model whose gates are on several towers, plans of all of them and of each one alone race as whole models,
    under one budget.

    Args:
        budget (`LatencyBudget`, *optional*): what the plans may cost. Without one they may not have more parameters
            than the plan that is given.
        plans (`int`): that enter, at most; what is given and the best plan by depth alone always do.
        few (`int`): plans of one source, at most.
        preparations (`tuple[str, ...]`): names in `PREPARATIONS`. All plans run with the first (as they were cut,
            where it cannot be done), the best of them with each of the others as well. Least squares lead every short
            run by what they give at once, so a plan with them says nothing about one without.
        share (`float`): of the recovery's steps that the race may cost. What it takes, the winner's recovery lacks.
        steps (`int`, *optional*): of a run in the first rung; as many as the share allows if left out. Each further
            rung runs twice as long.
        batch_size (`int`, *optional*): per device, in the race; a quarter of the recovery's if left out. A step counts
            as the part of the recovery's step that it is.
        learning_rate (`float`, *optional*): of the race; the recovery's if left out.
        onward (`str`): `"continued"`: each rung, and the recovery after the last one, starts from the weights that an
            entrant has; `"anew"`: from the cut and prepared ones.
        neighbours (`bool`): also tell of the nearest numbers of whole layers on both sides of the budget: what they
            lose as they are cut and, if there are steps enough, after a run.
        tolerance (`float`): how far above the latency budget a plan may be timed, in parts.
        rotate (`bool`): let plans cut the residual stream along directions that the calibration batches name
            (`find_basis`), where that is exact.
        held_out (`float`): part of the calibration batches (rows, of a single one) that the race is decided on.
        search (`SearchResult`, *optional*): whose best shapes enter as well.
        effort (`Effort`, *optional*): how long shapes are timed, and by which clock.
        latencies (*optional*): milliseconds of complete shapes, the dense one among them, timed under the budget's
            conditions before: `RaceRecord.latencies` of an earlier race.

    Raises:
        HawAdaError: listing everything that is wrong.

    References:
        Jamieson, Talwalkar, "Non-stochastic Best Arm Identification and Hyperparameter Optimization" (2016), for
        successive halving; Tang et al., "DarwinLM: Evolutionary Structured Pruning of Large Language Models" (2025),
        for choosing by a short training.
    """

    budget: LatencyBudget | None = None
    plans: int = 4
    few: int = 2
    preparations: tuple[str, ...] = ("least squares, close",)
    share: float = 0.03
    steps: int | None = None
    batch_size: int | None = None
    learning_rate: float | None = None
    onward: str = ONWARD[0]
    neighbours: bool = True
    tolerance: float = 0.0
    rotate: bool = True
    held_out: float = 0.25
    search: SearchResult | None = None
    effort: Effort | None = None
    latencies: Mapping[Sizes, float] | None = None

    def __post_init__(self) -> None:
        problems = []
        if self.budget is not None and not isinstance(self.budget, LatencyBudget):
            problems.append(f"budget must be a LatencyBudget, got a {type(self.budget).__name__}")
        for name in ("plans", "few", "steps", "batch_size"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                problems.append(f"{name} must be a whole number of at least 1, got {value!r}")
        unknown = [each for each in self.preparations if each not in PREPARATIONS]
        if unknown or not self.preparations:
            problems.append(f"preparations must be some of {list(PREPARATIONS)}, got {list(self.preparations)}")
        if self.onward not in ONWARD:
            problems.append(f"onward must be one of {list(ONWARD)}, got {self.onward!r}")
        for name, most in (("share", 0.9), ("held_out", 0.9), ("tolerance", 0.5)):
            value = getattr(self, name)
            if not 0 <= value <= most or (value == 0 and name != "tolerance"):
                problems.append(f"{name} must be above 0 and at most {most}, got {value!r}")
        if self.learning_rate is not None and not self.learning_rate > 0:
            problems.append(f"learning_rate must be above 0, got {self.learning_rate!r}")
        if problems:
            raise HawAdaError("\n".join(problems))

    def settings(self) -> dict[str, Any]:
        """What decides how a race runs, for JSON."""
        plain = asdict(replace(self, budget=None, search=None, effort=None, latencies=None))
        for name in ("search", "effort", "latencies"):
            del plain[name]
        return plain | {
            "budget": None if self.budget is None else str(self.budget),
            "preparations": list(self.preparations),
            "searched": None if self.search is None else self.search.plan.sizes,
        }

    def lengths(self, plans: int, preparations: int, neighbours: int, steps: float) -> list[int]:
        """
        The steps of a run in each rung: until one entrant is left, each rung half as many, twice as long.

        Args:
            plans: that enter.
            preparations: that the leader is tried with besides.
            neighbours: that run once.
            steps: of the race, in all.
        """
        sizes = [plans + preparations]
        while sizes[-1] > 2:
            sizes.append(math.ceil(sizes[-1] / 2))
        first = self.steps
        if first is None:
            each = sum(size * 2**rung for rung, size in enumerate(sizes)) + neighbours
            first = max(1, int(steps / each))
        return [first * 2**rung for rung in range(len(sizes))]

    def affordable(self, plans: int, neighbours: int, steps: float) -> tuple[int, int, int, list[int]]:
        """
        What of a race there are steps for: at first neighbours stay out, then the last plans, then preparations, until
        a run is of `LEAST` steps. With `steps` of their own all run.

        Args:
            plans: as in `lengths`.
            neighbours: as in `lengths`.
            steps: as in `lengths`.

        Returns:
            Plans, preparations besides the first, neighbours, and the steps of a run in each rung. One plan without
            another preparation: there is nothing to decide.
        """
        preparations = len(self.preparations) - 1
        while True:
            lengths = self.lengths(plans, preparations, neighbours, steps)
            if plans + preparations == 1:
                return plans, preparations, 0, lengths
            if self.steps is not None or lengths[0] >= LEAST:
                return plans, preparations, neighbours, lengths
            if neighbours:
                neighbours = 0
            elif plans > 2:
                plans -= 1
            elif preparations:
                preparations -= 1
            else:
                plans -= 1


def entrants_of(field: Iterable[Candidate], race: Race, neighbours: Iterable[Candidate] = ()) -> list[Entrant]:
    """The entrants of the first rung: each plan with the first preparation."""
    first = race.preparations[0]
    found = [Entrant(each.plan, each.source, first, each.ms, each.loss) for each in field]
    known = {each.plan for each in found}
    beside = [
        Entrant(e.plan, e.source, first, e.ms, e.loss, neighbour=True) for e in neighbours if e.plan not in known
    ]
    return [*found, *beside]


def run_race(
    record: RaceRecord,
    trial: Trial,
    *,
    retire: Callable[[Sequence[tuple[str, int]]], None] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Entrant:
    """
    Run what has not run yet, writing the record after every run, and name the winner.

    In the first rung all plans run, then the best of them with each further preparation. Of all that the better half
    goes on, rung after rung.

    Args:
        record: with the entrants of the first rung; it is added to.
        trial: trains an entrant and returns its held-out loss.
        retire: is told after every run of whom the weights may still be needed, and after which rung.
        clock: seconds.

    Raises:
        HawAdaError: if no entrant could be trained.
    """

    def run(entrants: Sequence[Entrant], rung: int, places: int) -> None:
        """Run those of the rung that did not run; who cannot be among the first `places` of it is out at once."""
        for place, entrant in enumerate(entrants):
            if record.find(entrant, rung) is not None:
                continue
            started = clock()
            loss = trial(entrant, rung, record.lengths[rung])
            seconds = clock() - started
            record.runs.append(Run(entrant.key, rung, record.lengths[rung], loss, round(seconds, 3)))
            record.write()
            logger.info("%s: %.4f after %d steps, %.1f s", entrant.name, loss, record.lengths[rung], seconds)
            if retire is not None:
                leading = [(each.entrant, rung) for each in record.standing(rung)[:places]]
                retire([*leading, *((each.key, rung - 1) for each in entrants[place + 1 :])])
            if len(record.runs) == 1:
                logger.info("the race will take about %.0f s", seconds * _runs_to_come(record) + record.seconds)

    if record.best is not None:
        return record.best
    first, *further = record.preparations
    able = [each for each in record.entrants if not each.neighbour]
    if len(able) == 1 and not further:  # nobody to run against
        record.winner = able[0].key
        record.write()
        return able[0]
    everyone = len(able) + sum(each not in {one.preparation for one in able} for each in further)
    starting = [
        each for each in record.entrants if each.preparation == first and (record.beside or not each.neighbour)
    ]
    run(starting, 0, math.ceil(everyone / 2))
    leader = record.entrant(_finite(record, 0)[0].entrant)
    known = {each.key for each in record.entrants}
    again = [replace(leader, preparation=name) for name in further]
    record.entrants.extend(each for each in again if each.key not in known)
    run([each for each in record.entrants if each.preparation != first], 0, math.ceil(everyone / 2))
    rung, standing = 0, _finite(record, 0)
    while len(standing) > 1 and rung + 1 < len(record.lengths):
        on = [each.entrant for each in standing[: math.ceil(len(standing) / 2)]]
        rung += 1
        run([record.entrant(key) for key in on], rung, math.ceil(len(on) / 2))
        standing = _finite(record, rung)
    winner = record.entrant(standing[0].entrant)
    record.winner = winner.key
    record.write()
    for line in record.lines():
        logger.info("%s", line)
    return winner


def _finite(record: RaceRecord, rung: int) -> list[Run]:
    """The runs of a rung that came to a loss, the best first."""
    found = [run for run in record.standing(rung) if math.isfinite(run.loss)]
    if not found:
        raise HawAdaError(
            f"no plan was trained to a finite loss in rung {rung + 1} of the race; lower its learning rate"
        )
    return found


def _runs_to_come(record: RaceRecord) -> float:
    """All runs of a race, in runs of the first rung, roughly."""
    return sum(record.beside or not each.neighbour for each in record.entrants) * len(record.lengths)
