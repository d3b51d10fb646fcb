"""
Narrower residual streams and narrower heads in a search: which sizes may win, and their latency tables: one of each
axis is measured, and the others follow.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from peft import PeftModel
from transformers import PreTrainedModel

from ..files.kept import Kept
from ..latency.budget import LatencyBudget
from ..latency.build import TABLE, least_multiple, random_shapes
from ..latency.cache import cached_table, table_key
from ..latency.effort import Effort
from ..latency.fit import table_between
from ..latency.measuring import measure_built
from ..latency.regime import Regime
from ..latency.table import LatencyTable, Realised
from ..latency.timing import unsettled
from ..progress import Progress
from ..vanilla.family import locate
from ..vanilla.legality import legal_head_shapes
from ..vanilla.shape import Shape
from .masked import DOUBT
from .space import SearchSpace
from .state import Quality, SearchState
from .timed import dense_model, sizes_at, table_of
from .timed_models import realiser

logger = logging.getLogger(__name__)

NARROWER = ("hidden_size", "head_dim")
"""What all shapes of a latency table share."""

CHECKED = 2
"""Random shapes that are timed to correct a table which follows from others, beside the largest."""


class NarrowTables:
    """
    Latency tables of hidden sizes, and of sizes of heads, below the dense ones, on the scale of the dense model's
    table.

    That of the narrowest is measured, of each axis and, when it is asked for, of both; those of the sizes between it
    and the dense one are means of both (`table_between`), corrected by a few shapes that are timed as a whole; where
    both axes are narrower, by those that the search times.

    Args:
        model: a dense or gated model; only its class and config are used.
        table: of the dense sizes.
        sizes: shapes of a `hidden_size`, or a `head_dim`, and nothing else.
        effort: of the dense table; less is done for these.
        progress: makes progress bars.
        kept: where timings are kept as they come.

    Raises:
        IllegalShapeError: if no model of one of the sizes exists.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        table: LatencyTable,
        sizes: Sequence[Shape],
        effort: Effort,
        *,
        progress: Progress | None = None,
        kept: Kept | None = None,
    ) -> None:
        self.model, self.table, self.effort = dense_model(model), table, effort.narrower()
        self.progress, self.kept = progress, kept
        self.regime: Regime = table.regime
        self.layout = locate(self.model)
        self.sizes = {size: sizes_at(self.model, size) for size in sizes}
        self.narrowest = {
            axis: min(found)
            for axis in NARROWER
            if (found := [size for each in sizes if (size := getattr(each, axis)) is not None])
        }
        self._measured: dict[Shape, LatencyTable] = {Shape(): table}

    def multiple(self, size: Shape) -> int:
        """What FFN sizes are multiples of at a hidden size."""
        if self.layout.family.ffn_unit and size.hidden_size is not None:  # the hidden size
            return least_multiple(self._at(size)[0], size.hidden_size)
        return self.table.multiple

    def expected(self, size: Shape) -> LatencyTable:
        """The table of a hidden size and a size of heads, as far as it follows from those that are measured."""
        for axis in NARROWER:
            if getattr(size, axis) not in (None, least := self.narrowest.get(axis)):
                wide, narrow = (self.expected(replace(size, **{axis: end})) for end in (None, least))
                return table_between(wide, narrow, self._at(size)[1], self.multiple(size), axis)
        return self._narrowest(size)

    def __call__(self, size: Shape) -> LatencyTable:
        """The table of a hidden size and a size of heads, from the disk cache if it is there."""
        between = {axis: each for axis in NARROWER if (each := getattr(size, axis)) is not None}
        if len(between) > 1 or between.items() <= self.narrowest.items():
            return self.expected(size)
        heads = legal_head_shapes(self.layout, size.hidden_size)
        key = table_key(self.regime, self._at(size)[1], heads, self.effort) | {"between": self.narrowest}
        return cached_table(partial(self._corrected, size), key, self.effort)

    def _at(self, size: Shape) -> tuple[Shape, dict[str, int | str]]:
        """The largest shape of these sizes, and what a table of them is for."""
        if size not in self.sizes:
            self.sizes[size] = sizes_at(self.model, size)
        return self.sizes[size]

    def meets(self, budget: LatencyBudget, space: SearchSpace) -> bool:
        """Whether the largest shape of a space surely meets a budget, as far as is known before it is timed."""
        size = Shape(hidden_size=space.hidden_size, head_dim=space.head_dim)
        state = SearchState(space, self.expected(size), budget, self.effort)
        return bool(state.surely()[int(state.parameters.argmax())])

    def _narrowest(self, size: Shape) -> LatencyTable:
        """The table of the narrowest of one axis, or of both."""
        if size not in self._measured:
            self._measured[size] = table_of(
                self.model,
                self.regime,
                self.effort,
                narrow=size,
                multiple=self.multiple(size),
                progress=self.progress,
                kept=self.kept,
            )
        return self._measured[size]

    def _corrected(self, size: Shape) -> LatencyTable:
        found, (widest, _) = self.expected(size), self._at(size)
        heads, count = legal_head_shapes(self.layout, size.hidden_size), min(CHECKED, self.effort.whole_shapes)
        if not count:
            return found
        shapes = [widest, *random_shapes(widest, heads, found.multiple, count, seed=self.effort.seed)]
        timings = measure_built(
            realiser(self.layout, self.regime),
            shapes,
            self.regime,
            reference=self.layout.dense,
            effort=self.effort,
            label=TABLE,
            progress=self.progress,
            kept=self.kept,
        )
        scale = found.dense_ms / timings[self.layout.dense].median_ms
        notes = [found.unsettled, unsettled(timings.values(), self.effort)]
        corrected = found.with_realised([Realised(shape, scale * timings[shape].median_ms) for shape in shapes])
        return replace(corrected, unsettled="; ".join(note for note in notes if note))


def most_loss(state: SearchState, quality: Quality) -> float:
    """
    What no size may lose alone that a search still counts: what the best shape of the dense hidden size and size of
    heads that meets the budget is predicted to lose, times `DOUBT`; infinite if none meets it.

    Args:
        state: of these dense sizes, nothing timed.
        quality: the losses. What it measures here the search asks for again.
    """
    if not state.fits().any():
        return math.inf
    state = state.of_worthwhile_depth()
    state.predict(quality)
    return DOUBT * float(state.predicted[state.fits()].min())


def worthwhile_sizes(
    limit: float, quality: Quality, sizes: Sequence[Shape], enough: Callable[[Shape], bool]
) -> list[Shape]:
    """
    The sizes of one axis at which a shape may lose less than the best one of the dense sizes that meets the budget.

    Whatever else is cut, a shape loses no less than its hidden size does alone, or its size of heads. So none counts
    that alone loses more than a limit; nor does any smaller one. And of two shapes that differ in that size alone the
    wider one loses less: so none counts below one that meets the budget by itself.

    Args:
        limit: of the loss (`most_loss`).
        quality: the losses. What it measures here the search asks for again.
        sizes: shapes of a `hidden_size`, or of a `head_dim`, and nothing else, in descending order.
        enough: whether a size surely meets the budget by itself; asked of those alone that do not lose too much.

    Returns:
        The first of them.
    """
    found: list[Shape] = []
    for size in sizes:
        loss = quality.evaluate(size) if math.isfinite(limit) else None
        if loss is not None and loss > limit:
            logger.info("%s alone loses %.4g, more than %.4g: it is left out", size.to_dict(), loss, limit)
            break
        found.append(size)
        if enough(size):
            logger.info("%s alone meets the budget: smaller ones are left out", size.to_dict())
            break
    return found


def both_narrower(
    limit: float, quality: Quality, one: Sequence[Shape], other: Sequence[Shape], enough: Callable[[Shape], bool]
) -> list[Shape]:
    """
    Of worthwhile sizes of two axes the pairs that may win: of those that do not meet the budget alone, where both
    together do not lose more than the limit, as if losses added up.

    Args:
        limit, quality, enough: as in `worthwhile_sizes`.
        one, other: what that found on each axis.
    """
    able = [[size for size in sizes if not enough(size)] for sizes in (one, other)]
    loss = {size: quality.evaluate(size) or 0.0 for sizes in able for size in sizes} if all(able) else {}
    return [
        replace(mine, head_dim=theirs.head_dim)
        for mine in able[0]
        for theirs in able[1]
        if loss[mine] + loss[theirs] <= limit
    ]
