"""
What is known while shapes are searched, and what is asked about their quality: predicted for all of them, measured for
the ones that matter.

Long because what all searches know, and what one over the space of a model does, are told apart here.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Generic, Protocol, TypeVar

import numpy as np
import torch

from ..gates.reading import UnitScores
from ..latency.budget import LatencyBudget
from ..latency.effort import Effort
from ..latency.interpolate import smooth
from ..latency.table import LatencyTable, Realised
from ..latency.timing import Timing
from ..planning.plan import Plan
from ..vanilla.shape import Shape
from .space import SearchSpace

S = TypeVar("S", bound=Hashable)
"""A shape, or those of several towers."""

Asked = TypeVar("Asked", contravariant=True)
"""The same, as an argument."""

Realise = Callable[[Sequence[S]], Mapping[S, Timing]]
"""Builds shapes with random weights and times them side by side, the dense shape among them."""

SLACK = (0.02, 0.1)
"""How far a table may be off where shapes are left out by it: twice its errors, within these parts of a latency."""

LEFT = 0.02
"""What an answer may leave of the budget, in parts of it, where larger shapes may meet it."""

KERNEL_WIDTH, KERNEL_PRIOR = 0.15, 0.3
"""How far a measured loss reaches, in parts of the dense sizes, and how much it is trusted."""


class Losses(Protocol[Asked]):
    """What the search measures. Losses are in what `meaning` says; 0 is the dense model."""

    @property
    def meaning(self) -> str:
        """What the losses are, for people."""

    def evaluate(self, shape: Asked) -> float | None:
        """The measured loss of a shape before any recovery; None if it cannot be measured."""

    def plan(self, shape: Asked) -> Plan:
        """What stays at a shape."""


class Quality(Losses[Shape], Protocol):
    """What the search asks about quality."""

    def predict(self, space: SearchSpace) -> np.ndarray:
        """The predicted loss over the space: (layers, heads, FFN sizes)."""


class RankedQuality(Quality, Protocol):
    """A quality that also says what may be cut, and by which scores."""

    @property
    def free(self) -> tuple[str, ...]:
        """What may be cut."""

    @property
    def scores(self) -> UnitScores:
        """Of the units."""


class State(ABC, Generic[S]):
    """
    What is known about the shapes of a search while it goes on, by their positions. Latencies are on the scale of the
    table's dense model.

    Args:
        dense: the dense shape.
        table: whose scale, regime and device it is.
        budget: the limits.
        effort: how hard to look.
        parameters: of the slim models: (positions,).
        memory: bytes of their weights and KV caches: (positions,).
    """

    def __init__(
        self,
        dense: S,
        table: LatencyTable,
        budget: LatencyBudget,
        effort: Effort,
        parameters: np.ndarray,
        memory: np.ndarray,
    ) -> None:
        self.dense, self.budget, self.effort = dense, budget, effort
        self.parameters, self.memory = parameters, memory
        self.predicted = np.zeros(len(parameters))
        self.times: dict[int, float] = {}
        self.losses: dict[int, float] = {}
        self.expected_ms: dict[int, float] = {}  # of what was timed, before that
        self.expected_loss: dict[int, float] = {}
        self.dense_ms = table.dense_ms
        self._estimates: np.ndarray | None = None
        self.shapes = len(parameters)  # that there were to choose from

    @property
    @abstractmethod
    def table(self) -> LatencyTable:
        """Whose scale, regime and device it is."""

    @property
    @abstractmethod
    def steps(self) -> Mapping[str, str]:
        """By size, which values there were to choose from, and why."""

    @abstractmethod
    def shape(self, index: int) -> S:
        """The shape at a position."""

    @abstractmethod
    def sizes(self, index: int) -> tuple[Shape, Mapping[str, Shape]]:
        """The same as sizes: those of the tower that figures of one tower are about, and of further ones."""

    @abstractmethod
    def estimates(self) -> np.ndarray:
        """The latencies that are expected: (positions,)."""

    @abstractmethod
    def correct(self, ratios: Mapping[int, float]) -> None:
        """Take in what shapes take, of what the dense one does, by the position."""

    @abstractmethod
    def places(self) -> torch.Tensor:
        """The shapes in parts of the dense sizes: (positions, sizes)."""

    @property
    def limit(self) -> float:
        """The budget on the table's scale: the machine may be faster or slower now than when the table was made."""
        return self.budget.limit_ms(self.dense_ms) * self.table.dense_ms / self.dense_ms

    def ms(self) -> np.ndarray:
        """Over the space: measured where it was timed, estimated elsewhere."""
        if self._estimates is None:
            self._estimates = self.estimates()
            self._estimates[list(self.times)] = list(self.times.values())
        return self._estimates

    def loss(self) -> np.ndarray:
        """Over the space: measured where it was evaluated, else predicted, corrected by what was measured nearby."""
        if not self.losses:
            return self.predicted
        where = self.places()
        known = list(self.losses)
        measured = np.maximum([self.losses[index] for index in known], 1e-9)
        left = np.log(measured / np.maximum(self.predicted[known], 1e-9))
        residual = smooth(
            where, where[known], torch.from_numpy(np.clip(left, -5, 5)), width=KERNEL_WIDTH, prior=KERNEL_PRIOR
        )
        corrected = self.predicted * np.exp(residual.numpy())
        corrected[known] = measured
        return corrected

    def fits(self) -> np.ndarray:
        """Over the space: whether all limits hold, with the margin for what is only estimated."""
        ms = self.ms()
        latency = ms <= self.limit * self.room() if math.isfinite(self.limit) else np.ones(len(ms), dtype=bool)
        return latency & self.small()

    def room(self) -> np.ndarray:
        """Over the space: what of the limit may be used."""
        room = np.full(len(self.parameters), 1 - self.effort.margin)
        room[list(self.times)] = 1 - self.effort.margin / 2
        return room

    def small(self) -> np.ndarray:
        """Over the space: whether the limits of size hold."""
        parameters, memory = self.budget.max_parameters, self.budget.max_memory
        fits = np.ones(len(self.parameters), dtype=bool)
        if parameters is not None:
            fits &= self.parameters <= parameters
        if memory is not None:
            fits &= self.memory <= memory
        return fits

    def choose(self, ranked: np.ndarray, count: int) -> list[int]:
        """
        The best shapes that were not timed yet: until one has met the budget first the best of each of several depths,
        then the best at all.
        """
        untimed = [int(index) for index in ranked if int(index) not in self.times]
        if self.met:
            return untimed[:count]
        seen: dict[tuple[int | None, ...], int] = {}
        for index in untimed:
            seen.setdefault(self.depths(index), index)
        return list(dict.fromkeys([*list(seen.values())[:count], *untimed]))[:count]

    def nearer(self, index: int) -> list[int]:
        """
        Where a shape that was timed leaves more than `LEFT` of the budget: shapes not timed yet that are expected to
        use more of it, with half the margin, and to lose less, the best first. What keeps all that the shape keeps
        loses no more than it, whatever is predicted: a measured loss may beat predicted ones by luck.
        """
        ms, loss, margin = self.ms(), self.loss(), self.effort.margin / 2
        if not math.isfinite(self.limit) or ms[index] >= (1 - LEFT) * self.limit:
            return []
        places = self.places()
        least = np.where((places >= places[index]).all(1).numpy(), np.minimum(loss, loss[index]), loss)
        better = self.small() & (ms > ms[index]) & (ms <= (1 - margin) * self.limit) & (least <= loss[index])
        found = [int(place) for place in np.flatnonzero(better) if place not in self.times]
        return sorted(found, key=lambda place: (least[place], -ms[place]))

    @property
    def met(self) -> bool:
        """Whether a shape that was timed meets all limits."""
        return bool(self.fitting(list(self.times)))

    def fitting(self, indices: Sequence[int]) -> list[int]:
        """Those of some shapes that meet all limits, as far as is known."""
        fits = self.fits()
        return [index for index in indices if fits[index]]

    def evaluate(self, indices: Sequence[int], quality: Losses[S]) -> None:
        """Measure the loss of shapes, where it can be."""
        new = [index for index in indices if index not in self.losses]
        expected = self.loss() if new else self.predicted
        for index in new:
            loss = quality.evaluate(self.shape(index))
            if loss is not None:
                self.losses[index], self.expected_loss[index] = loss, float(expected[index])

    def depths(self, index: int) -> tuple[int | None, ...]:
        """The numbers of layers at a position."""
        first, beside = self.sizes(index)
        return (first.num_hidden_layers, *(each.num_hidden_layers for each in beside.values()))

    def time(self, indices: Sequence[int], realise: Realise[S], *, final: bool = False) -> None:
        """
        Realise and time shapes; correct estimates by them. What counts is the ratio to the dense model beside them.
        A final timing is made of several instances and replaces an earlier one.
        """
        shapes = [self.shape(index) for index in indices]
        before = self.ms()
        self.expected_ms = {index: float(before[index]) for index in indices} | self.expected_ms
        runs = [realise(shapes) for _ in range(self.effort.instances if final else 1)]
        dense = [timings[self.dense].median_ms for timings in runs]
        self.dense_ms = float(np.median(dense))
        found: dict[int, float] = {}
        for index, shape in zip(indices, shapes, strict=True):
            ratios = [timings[shape].median_ms / beside for timings, beside in zip(runs, dense, strict=True)]
            found[index] = float(np.median(ratios))
            self.times[index] = found[index] * self.table.dense_ms
        self.correct(found)
        self._estimates = None


class SearchState(State[Shape]):
    """
    What is known about the space of a model. It is made of the spaces of all hidden sizes and sizes of heads, one
    after the other.
    """

    def __init__(
        self,
        space: SearchSpace,
        table: LatencyTable,
        budget: LatencyBudget,
        effort: Effort,
        narrower: Sequence[tuple[SearchSpace, LatencyTable]] = (),
    ) -> None:
        self.spaces, self.tables = [space, *(each for each, _ in narrower)], [table, *(each for _, each in narrower)]
        self.ends = np.cumsum([len(each) for each in self.spaces])
        parameters = np.concatenate([each.parameters.ravel() for each in self.spaces])
        memory = np.concatenate([each.memory.ravel() for each in self.spaces])
        super().__init__(space.dense, table, budget, effort, parameters, memory)

    @property
    def table(self) -> LatencyTable:
        """The table of the dense hidden size, and size of heads."""
        return self.tables[0]

    @property
    def steps(self) -> Mapping[str, str]:
        """Of the dense hidden size."""
        return self.spaces[0].steps

    def place(self, index: int) -> tuple[int, int]:
        """Which of the spaces a position lies in, and where there."""
        part = int(np.searchsorted(self.ends, index, side="right"))
        return part, index - int(self.ends[part]) + len(self.spaces[part])

    def shape(self, index: int) -> Shape:
        """The shape at a position."""
        part, local = self.place(index)
        return self.spaces[part].shape(local)

    def sizes(self, index: int) -> tuple[Shape, Mapping[str, Shape]]:
        """The shape; there are no further towers."""
        return self.shape(index), {}

    def predict(self, quality: Quality) -> None:
        """Ask for the predicted losses."""
        self.predicted = np.concatenate([quality.predict(space).ravel() for space in self.spaces])

    def surely(self) -> np.ndarray:
        """Over the space: whether all limits hold, also if the tables are off by `SLACK`."""
        ms = self.ms() / np.repeat([1 - _slack(table) for table in self.tables], [len(each) for each in self.spaces])
        return self.small() & (ms <= self.limit * (1 - self.effort.margin))

    def of_worthwhile_depth(self, *, alone: bool = True) -> SearchState:
        """
        The same without the shapes that are shallower than any budget of these sizes asks for.

        Of two shapes of the same widths the deeper one loses less. So no shape matters that has fewer layers than the
        deepest one of its widths that meets the budget, by the table and `SLACK`; the widest shapes need fewest. That
        spares measuring the loss of depths which are not needed.

        Args:
            alone: widths that meet the budget at no depth do not count; of several towers they do, as the others may
                meet it.
        """
        parts, start = [], 0
        fits, surely = self.fits(), self.surely()
        for space, end in zip(self.spaces, self.ends, strict=True):
            layers = np.array(space.layers)[:, None]
            some = fits[start:end].reshape(len(layers), -1)
            sure = surely[start:end].reshape(len(layers), -1)
            deepest = np.where(sure, layers, 0).max(axis=0)
            deepest = deepest[some.any(axis=0)] if alone else deepest
            parts.append(space.of_depth(max(int(deepest.min(initial=layers.max())), min(space.layers))))
            start = end
        narrower = list(zip(parts[1:], self.tables[1:], strict=True))
        state = SearchState(parts[0], self.table, self.budget, self.effort, narrower)
        state.shapes = self.shapes
        return state

    def estimates(self) -> np.ndarray:
        """By the tables."""
        parts = [
            table.estimate_sizes(*space.axes).numpy().ravel() * (self.table.dense_ms / table.dense_ms)
            for space, table in zip(self.spaces, self.tables, strict=True)
        ]
        return np.concatenate(parts)

    def correct(self, ratios: Mapping[int, float]) -> None:
        """Correct the tables."""
        points: dict[int, list[Realised]] = {}
        for index, ratio in ratios.items():
            shape, part = self.shape(index), self.place(index)[0]
            mine = [] if shape == self.dense else [Realised(shape, ratio * self.tables[part].dense_ms)]
            points.setdefault(part, []).extend(mine)
        for part, realised in points.items():
            self.tables[part] = self.tables[part].with_realised(realised)

    def places(self) -> torch.Tensor:
        """(space, 4) in parts of the dense sizes; (space, 6) where there are several hidden or head sizes."""
        rows = []
        for space, table in zip(self.spaces, self.tables, strict=True):
            groups, per_group, ffn, layers = space.axes
            sizes = self.dense.sizes().values()
            parts = [v / s for v, s in zip((groups * per_group, groups, ffn, layers), sizes, strict=True)]
            for name in ("hidden_size", "head_dim") if len(self.spaces) > 1 else ():
                widths = [int(each.base_sizes[name]) for each in (table, self.table)]
                parts.append(np.full((1, 1, 1), widths[0] / widths[1]))
            rows.append(np.stack(np.broadcast_arrays(*parts), axis=-1).reshape(-1, len(parts)))
        return torch.from_numpy(np.concatenate(rows))


def _slack(table: LatencyTable) -> float:
    least, most = SLACK
    return min(most, max(least, 2 * table.errors.get("p95", most)))
