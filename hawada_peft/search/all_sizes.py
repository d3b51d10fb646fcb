"""One search over the spaces of all hidden sizes."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

from transformers import PreTrainedModel

from ..files.kept import Kept
from ..gates.reading import UnitScores
from ..latency.budget import LatencyBudget
from ..latency.effort import Effort
from ..latency.table import LatencyTable
from ..latency.timing import warn_unsettled
from ..progress import Progress
from ..vanilla.family import locate
from .narrow import NarrowTables, worthwhile_sizes
from .quality import Quality
from .result import SearchResult
from .rounds import search
from .space import SearchSpace, search_space
from .state import SearchState
from .timed import Timer

logger = logging.getLogger(__name__)


class RankedQuality(Quality, Protocol):
    """A quality that also says what may be cut, and by which scores."""

    @property
    def free(self) -> tuple[str, ...]:
        """What may be cut."""

    @property
    def scores(self) -> UnitScores:
        """Of the units."""


def search_all_sizes(
    base: PreTrainedModel,
    budget: LatencyBudget,
    quality: RankedQuality,
    table: LatencyTable,
    sizes: Sequence[int],
    *,
    choose: bool,
    untied: int = 0,
    effort: Effort,
    progress: Progress | None = None,
    kept: Kept | None = None,
) -> SearchResult:
    """
    `search` in the spaces of the dense hidden size and of narrower ones.

    Args:
        base: the dense model; only its class and config are used.
        budget: the limits.
        quality: the losses.
        table: of the dense hidden size; its regime is that of the search.
        sizes: narrower hidden sizes, the largest first.
        choose: search of these only what may win (`worthwhile_sizes`).
        untied: rows of an output projection that narrower models have and the dense one does not.
        effort: how hard to measure and to look, and by which clock.
        progress: makes progress bars.
        kept: where timings are kept as they come.

    Raises:
        InfeasibleBudgetError: if no shape meets the budget.
        IllegalShapeError: if no model of one of the hidden sizes exists.

    Warns:
        UnsettledTimingWarning: once, if timers did not settle.
    """
    layout, regime, tables = locate(base), table.regime, [table]

    def space_of(size: int | None, multiple: int) -> SearchSpace:
        return search_space(
            layout,
            regime,
            multiple=multiple,
            group_size=quality.scores.group_size,
            free=quality.free,
            hidden_size=size,
            untied=0 if size is None else untied,
        )

    spaces, given = [space_of(None, table.multiple)], len(sizes)
    if sizes:
        narrow = NarrowTables(base, table, sizes, effort, progress=progress, kept=kept)
        spaces_of = {size: space_of(size, narrow.multiple(size)) for size in sizes}
        if choose:
            state = SearchState(spaces[0], table, budget, effort)
            sizes = worthwhile_sizes(state, quality, sizes, lambda size: narrow.meets(budget, spaces_of[size]))
        tables += [narrow(size) for size in sizes]
        spaces += [spaces_of[size] for size in sizes]
    if table.poor:
        logger.warning("%s; twice as many shapes are timed directly", table.poor)
        effort = replace(effort, candidates=2 * effort.candidates, search_rounds=2 * effort.search_rounds)
    timer = Timer(base, regime, effort.confirming(), progress=progress, kept=kept)
    narrower = list(zip(spaces[1:], tables[1:], strict=True))
    result = search(spaces[0], table, quality, budget, timer, effort=effort, narrower=narrower)
    if given:
        kind = "directions of a basis" if quality.scores.rotated else "channels"
        words = f"{len(sizes) + 1} of {given + 1} sizes, by {kind}"
        if len(sizes) < given:
            words += "; the smaller ones cut more than the budget asks for"
        result = replace(result, steps={**result.steps, "hidden_size": words})
    warn_unsettled(*(each.unsettled for each in tables), timer.unsettled)
    return result
