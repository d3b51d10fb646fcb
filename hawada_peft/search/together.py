"""
The search over several towers of one model, under one budget.

What each tower would save and lose is known by itself: by a latency table of the whole model in which this tower's
sizes vary, and by its own predicted losses. Savings and losses are added. The best combinations of what no other shape
of a tower beats are built and timed as whole models, and judged as such, until the best one was measured.

Long because a combination, what is known of it and what it loses are one idea.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from transformers import PreTrainedModel

from ..files.kept import Kept
from ..latency.budget import LatencyBudget
from ..latency.effort import Effort
from ..latency.interpolate import smooth
from ..latency.regime import Regime
from ..latency.table import LatencyTable
from ..latency.timing import warn_unsettled
from ..planning.plan import Plan
from ..planning.towers import shared_sizes
from ..progress import Progress
from ..vanilla.family import Layout
from ..vanilla.shape import BY_NAME, HEADS, KV_GROUPS, Shape
from .answer import check_feasible, frontier
from .masked import MaskedQuality
from .result import SearchResult
from .rounds import best_of, enough_for
from .space import SearchSpace, search_space
from .state import KERNEL_PRIOR, KERNEL_WIDTH, SearchState, State
from .timed import Timer, table_of
from .timed_models import realiser_of

logger = logging.getLogger(__name__)

MOST = 180
"""Of a tower, and of the towers before it, so many shapes and combinations that no other beats are combined."""

LEAST = 0.02
"""No combination is expected to take less of the dense model's latency: savings that were measured apart are added."""


@dataclass(frozen=True)
class Together:
    """
    Sizes of several towers of one model.

    Args:
        shapes (`tuple[Shape, ...]`): of each, complete.
    """

    shapes: tuple[Shape, ...]

    def __str__(self) -> str:
        return "; ".join(str(shape.to_dict()) for shape in self.shapes)


@dataclass(frozen=True)
class Numbers:
    """
    Which sizes of several towers one number of the config sets: the first of these towers says it for all.

    Args:
        owners (`Mapping[tuple[int, str], int]`): by a later tower and a size's field the first one.
    """

    owners: Mapping[tuple[int, str], int]

    @classmethod
    def of(cls, layouts: Sequence[Layout]) -> Numbers:
        """What the towers of a model share."""
        shared = shared_sizes(layouts)
        heads, groups = BY_NAME[HEADS].field, BY_NAME[KV_GROUPS].field
        if heads in shared and not any(layout.family.kv_heads_field for layout in layouts):
            shared[groups] = shared[heads]  # plain multi-head attention, of which both are one number
        return cls({(later, size): each[0] for size, each in shared.items() for later in each[1:]})

    def complete(self, shapes: Sequence[Shape]) -> Together:
        """The shapes with what the first of them say of later ones."""
        found = list(shapes)
        for (later, size), first in self.owners.items():
            found[later] = replace(found[later], **{size: getattr(found[first], size)})
        return Together(tuple(found))

    def said_of(self, tower: int, shape: Shape) -> dict[int, Shape]:
        """What a shape of one tower says of later ones."""
        found: dict[int, dict[str, int]] = {}
        for (later, size), first in self.owners.items():
            if first == tower and (number := getattr(shape, size)) is not None:
                found.setdefault(later, {})[size] = number
        return {later: Shape(**sizes) for later, sizes in found.items()}

    def own(self, tower: int, free: Sequence[Sequence[str]]) -> list[str]:
        """What of a tower is its to cut: no earlier one says it, and later ones that follow have gates on it, too."""

        def followed(axis: str) -> bool:
            size = BY_NAME[axis].field
            later = [each for (each, field), first in self.owners.items() if first == tower and field == size]
            return all(axis in free[each] for each in later)

        return [axis for axis in free[tower] if (tower, BY_NAME[axis].field) not in self.owners and followed(axis)]


class TogetherState(State[Together]):
    """
    What is known about combinations of the towers' shapes.

    Args:
        towers: what is known of the shapes of each, by its name.
        positions: which of their shapes are combined: (towers, combinations).
        numbers: what they share.
        budget: the limits.
        effort: how hard to look.
    """

    def __init__(
        self,
        towers: Mapping[str, SearchState],
        positions: np.ndarray,
        numbers: Numbers,
        budget: LatencyBudget,
        effort: Effort,
    ) -> None:
        self.names, self.states, self.numbers = list(towers), list(towers.values()), numbers
        self.positions = positions
        pairs = list(zip(self.states, self.positions, strict=True))
        weight, whole = self.states[0].spaces[0].weight_bytes, max(state.parameters.max() for state in self.states)
        parameters = whole - sum(whole - state.parameters[places] for state, places in pairs)
        caches = sum((state.memory - weight * state.parameters)[places] for state, places in pairs)
        dense = Together(tuple(state.dense for state in self.states))
        super().__init__(dense, self.states[0].table, budget, effort, parameters, weight * parameters + caches)
        self.predicted = np.sum([state.predicted[places] for state, places in pairs], axis=0)
        self.shapes = math.prod(state.shapes for state in self.states)

    @property
    def table(self) -> LatencyTable:
        """That of the first tower."""
        return self.states[0].table

    @property
    def steps(self) -> Mapping[str, str]:
        """Of every tower what it says, of further ones with the name before that of the size."""
        return {
            f"{name}.{size}" if tower else size: why
            for tower, (name, state) in enumerate(zip(self.names, self.states, strict=True))
            for size, why in state.steps.items()
            if (tower, size) not in self.numbers.owners
        }

    def shape(self, index: int) -> Together:
        """The combination at a position."""
        places = self.positions[:, index]
        return self.numbers.complete(
            [state.shape(int(place)) for state, place in zip(self.states, places, strict=True)]
        )

    def sizes(self, index: int) -> tuple[Shape, Mapping[str, Shape]]:
        """The shape of the first tower, and those of the others by their names."""
        first, *others = self.shape(index).shapes
        return first, dict(zip(self.names[1:], others, strict=True))

    def estimates(self) -> np.ndarray:
        """What the towers save is added, and corrected by combinations nearby that were timed."""
        dense, pairs = self.table.dense_ms, zip(self.states, self.positions, strict=True)
        saved = np.sum([1 - (state.ms() / state.table.dense_ms)[places] for state, places in pairs], axis=0)
        plain = dense * np.maximum(LEAST, 1 - saved)
        if not self.times:
            return plain
        known = list(self.times)
        left = torch.from_numpy(np.log(np.array(list(self.times.values())) / plain[known]))
        where = self.places()
        carried = smooth(where, where[known], left, width=KERNEL_WIDTH, prior=KERNEL_PRIOR)
        return plain * np.exp(carried.numpy())

    def correct(self, ratios: Mapping[int, float]) -> None:
        """Nothing more than `times`, by which `estimates` goes."""

    def places(self) -> torch.Tensor:
        """(combinations, sizes of all towers), in parts of the dense sizes."""
        pairs = zip(self.states, self.positions, strict=True)
        return torch.cat([state.places()[torch.from_numpy(places)] for state, places in pairs], dim=-1)


class TogetherQuality:
    """
    What combinations lose, by the same measure as what each tower loses by itself.

    Args:
        towers: the quality of each tower's shapes.
        numbers: what they share. What a shape of one tower means for others is judged with it from now on.
    """

    def __init__(self, towers: Sequence[MaskedQuality], numbers: Numbers) -> None:
        self.towers = towers
        for tower, quality in enumerate(towers):
            quality.also = partial(self._said_of, numbers, tower)

    @property
    def meaning(self) -> str:
        """What the losses are, for people."""
        return self.towers[0].meaning

    def evaluate(self, shape: Together) -> float:
        """The measured loss of the whole model at these sizes."""
        return self.towers[0].judge(self.plan(shape))

    def plan(self, shape: Together) -> Plan:
        """What stays of each tower."""
        return Plan.of_towers([each.part(sizes) for each, sizes in zip(self.towers, shape.shapes, strict=True)])

    def _said_of(self, numbers: Numbers, tower: int, shape: Shape) -> list[Plan]:
        return [self.towers[later].part(sizes) for later, sizes in numbers.said_of(tower, shape).items()]


def search_together(
    model: PreTrainedModel,
    layouts: Sequence[Layout],
    regime: Regime,
    budget: LatencyBudget,
    quality_of: Callable[[str, MaskedQuality | None], MaskedQuality],
    *,
    tables: Mapping[str, LatencyTable] | None = None,
    effort: Effort,
    progress: Progress | None = None,
    kept: Kept,
) -> SearchResult:
    """
    Find the sizes of least loss of several towers that meet a budget together.

    Args:
        model: the dense one; only its class and config are used.
        layouts: of the towers; all run in a call.
        regime: the conditions.
        budget: the limits.
        quality_of: makes the quality of a tower's shapes, given that of the first one.
        tables: of towers, measured before; others are measured.
        effort: how hard to measure and to look.
        progress: makes progress bars, as `tqdm.tqdm`; none are shown if left out.
        kept: where timings are kept as they come.

    Raises:
        InfeasibleBudgetError: if no combination meets the budget.

    Warns:
        UnsettledTimingWarning: if timers did not settle.
    """
    names, numbers = [layout.tower for layout in layouts], Numbers.of(layouts)
    measured, given = partial(table_of, model, regime, effort, progress=progress), tables or {}
    found = [given.get(name) or measured(tower=name, kept=kept.under(name)) for name in names]
    effort = enough_for(effort, found)
    qualities: list[MaskedQuality] = []
    for name in names:
        qualities.append(quality_of(name, qualities[0] if qualities else None))
    quality = TogetherQuality(qualities, numbers)

    def space_of(tower: int) -> SearchSpace:
        scores = qualities[tower].scores
        free = numbers.own(tower, [each.free for each in qualities])
        return search_space(
            layouts[tower], regime, multiple=found[tower].multiple, group_size=scores.group_size, free=free
        )

    states = {
        name: SearchState(space_of(tower), found[tower], budget, effort).of_worthwhile_depth(alone=len(names) == 1)
        for tower, name in enumerate(names)
    }
    together = partial(TogetherState, states, numbers=numbers, budget=budget, effort=effort)
    check_feasible(together(_product(*map(_ends, states.values()))))
    for state, each in zip(states.values(), qualities, strict=True):
        state.predict(each)
    built, combined = realiser_of(layouts, regime), together(_combined(list(states.values())))
    timer: Timer[Together] = Timer(
        model,
        regime,
        effort.confirming(),
        of=(combined.dense, lambda sizes: built(sizes.shapes)),
        progress=progress,
        kept=kept,
    )
    result = best_of(combined, quality, timer)
    warn_unsettled(*(table.unsettled for table in found), timer.unsettled)
    return replace(result, depth=qualities[0].depth)


def _ends(state: SearchState) -> np.ndarray:
    """The dense shape of a tower, and those of least latency and size."""
    dense = int(np.argmax(state.parameters))
    return np.unique([dense, np.argmin(state.ms()), np.argmin(state.parameters), np.argmin(state.memory)])


def _combined(states: Sequence[SearchState]) -> np.ndarray:
    """Combinations of what no other shape of a tower beats, nor of those before it: (towers, combinations)."""
    positions, costs, losses = np.zeros((0, 1), dtype=int), np.zeros((1, 1)), np.zeros(1)
    for number, state in enumerate(states):
        here = np.stack(_costs(state))
        mine = _unbeaten(here, state.predicted)
        before = _unbeaten(costs, losses) if number else np.arange(1)
        left, right = _product(before, mine)
        positions = np.concatenate([positions[:, left], right[None]])
        costs, losses = costs[:, left] + here[:, right], losses[left] + state.predicted[right]
    return positions


def _costs(state: SearchState) -> list[np.ndarray]:
    """What is limited, of every shape of a tower, less what the dense shape takes: of the others these are added."""
    costs, budget = [], state.budget
    if math.isfinite(state.limit):
        costs.append(state.ms() / state.table.dense_ms - 1)
    if budget.max_parameters is not None:
        costs.append(state.parameters - state.parameters.max())
    if budget.max_memory is not None:
        costs.append(state.memory - state.memory.max())
    return costs


def _unbeaten(costs: np.ndarray, losses: np.ndarray) -> np.ndarray:
    """What no other beats in loss and in one of the costs (costs, shapes), evenly thinned to about `MOST`."""
    room, found = MOST // len(costs), []
    for cost in costs:
        best = frontier(cost, losses)
        found.append(best[np.unique(np.linspace(0, len(best) - 1, min(room, len(best))).round().astype(int))])
    return np.unique(np.concatenate(found))


def _product(*chosen: Sequence[int] | np.ndarray) -> np.ndarray:
    """All combinations: (chosen, combinations)."""
    grid = np.meshgrid(*chosen, indexing="ij")
    return np.stack([each.ravel() for each in grid])
