"""
Narrower residual streams in a search: which hidden sizes may win, and their latency tables: one is measured, and the
others follow.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property, partial

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

CHECKED = 2
"""Random shapes that are timed to correct a table which follows from others, beside the largest."""


class NarrowTables:
    """
    Latency tables of hidden sizes below the dense one, on the scale of the dense model's table.

    That of the narrowest is measured; those of the sizes between it and the dense one are means of both
    (`table_between`), corrected by a few shapes that are timed as a whole.

    Args:
        model: a dense or gated model; only its class and config are used.
        table: of the dense hidden size.
        sizes: the hidden sizes.
        effort: of the dense table; less is done for these.
        progress: makes progress bars.
        kept: where timings are kept as they come.

    Raises:
        IllegalShapeError: if no model of one of the hidden sizes exists.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        table: LatencyTable,
        sizes: Sequence[int],
        effort: Effort,
        *,
        progress: Progress | None = None,
        kept: Kept | None = None,
    ) -> None:
        self.model, self.table, self.effort = dense_model(model), table, effort.narrower()
        self.progress, self.kept = progress, kept
        self.regime: Regime = table.regime
        self.layout, self.narrowest = locate(self.model), min(sizes)
        self.sizes = {size: sizes_at(self.model, size) for size in sizes}

    def multiple(self, size: int) -> int:
        """What FFN sizes are multiples of at a hidden size."""
        if self.layout.family.ffn_unit:  # the hidden size
            return least_multiple(self.sizes[size][0], size)
        return self.table.multiple

    def expected(self, size: int) -> LatencyTable:
        """The table of a hidden size, as far as it follows from those that are measured."""
        if size == self.narrowest:
            return self._measured
        return table_between(self.table, self._measured, self.sizes[size][1], self.multiple(size))

    def __call__(self, size: int) -> LatencyTable:
        """The table of a hidden size, from the disk cache if it is there."""
        if size == self.narrowest:
            return self._measured
        heads = legal_head_shapes(self.layout, size)
        key = table_key(self.regime, self.sizes[size][1], heads, self.effort) | {"between": self.narrowest}
        return cached_table(partial(self._corrected, size), key, self.effort)

    def meets(self, budget: LatencyBudget, space: SearchSpace) -> bool:
        """Whether the largest shape of a hidden size surely meets a budget, as far as is known before it is timed."""
        state = SearchState(space, self.expected(space.hidden_size or self.layout.hidden_size), budget, self.effort)
        return bool(state.surely()[int(state.parameters.argmax())])

    @cached_property
    def _measured(self) -> LatencyTable:
        size = self.narrowest
        return table_of(
            self.model,
            self.regime,
            self.effort,
            hidden_size=size,
            multiple=self.multiple(size),
            progress=self.progress,
            kept=self.kept,
        )

    def _corrected(self, size: int) -> LatencyTable:
        found, (widest, _) = self.expected(size), self.sizes[size]
        heads, count = legal_head_shapes(self.layout, size), min(CHECKED, self.effort.whole_shapes)
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


def worthwhile_sizes(
    state: SearchState, quality: Quality, sizes: Sequence[int], enough: Callable[[int], bool]
) -> list[int]:
    """
    The hidden sizes at which a shape may lose less than the best one of the dense hidden size that meets the budget.

    Whatever else is cut, a shape loses no less than its hidden size does alone. So none counts that alone loses more
    than that best shape is predicted to lose, times `DOUBT`; nor does any smaller one. And of two shapes that differ
    in their hidden size alone the wider one loses less: so none counts below one that meets the budget by itself.

    Args:
        state: of the dense hidden size, nothing timed.
        quality: the losses. What it measures here the search asks for again.
        sizes: in descending order.
        enough: whether a hidden size surely meets the budget by itself; asked of those alone that do not lose too
            much.

    Returns:
        The first of them.
    """
    limit = math.inf
    if state.fits().any():
        state = state.of_worthwhile_depth()
        state.predict(quality)
        limit = DOUBT * float(state.predicted[state.fits()].min())
    found: list[int] = []
    for size in sizes:
        loss = quality.evaluate(Shape(hidden_size=size)) if math.isfinite(limit) else None
        if loss is not None and loss > limit:
            logger.info("a hidden size of %d alone loses %.4g, more than %.4g: it is left out", size, loss, limit)
            break
        found.append(size)
        if enough(size):
            logger.info("a hidden size of %d alone meets the budget: smaller ones are left out", size)
            break
    return found
