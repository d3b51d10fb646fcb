"""The search for the shape: every legal one under the budget, scored, realised and timed until one meets it."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cache

import numpy as np
from transformers import PreTrainedModel

from ..files.kept import Kept
from ..latency.budget import LatencyBudget
from ..latency.effort import Effort
from ..latency.table import LatencyTable
from ..latency.timing import warn_unsettled
from ..progress import Progress
from ..vanilla.family import locate
from ..vanilla.shape import Shape
from .answer import check_feasible, result_of, settle
from .narrow import NarrowTables, both_narrower, most_loss, worthwhile_sizes
from .result import SearchResult
from .space import SearchSpace, search_space
from .state import Losses, Quality, RankedQuality, Realise, S, SearchState, State
from .timed import Timer

logger = logging.getLogger(__name__)

GIVEN_BACK = 3
"""Rounds at most in which shapes nearer to the budget are tried, where the answer leaves much of it."""


def search(
    space: SearchSpace,
    table: LatencyTable,
    quality: Quality,
    budget: LatencyBudget,
    realise: Realise[Shape],
    *,
    effort: Effort | None = None,
    narrower: Sequence[tuple[SearchSpace, LatencyTable]] = (),
) -> SearchResult:
    """
    Find the shape of least loss that meets a budget.

    All shapes that the budget may need are estimated and scored. The best are built with random weights and timed, and
    evaluated with their gates closed; table and scores are corrected by that and the search is repeated, until the
    best shape is one that was timed, evaluated, timed once more on its own and found to meet the budget.

    Args:
        space: the shapes.
        table: their latencies.
        quality: their losses.
        budget: the limits.
        realise: builds and times shapes.
        effort: how hard to look.
        narrower: the shapes of other hidden sizes and sizes of heads, and their tables; searched together with the
            rest.

    Raises:
        InfeasibleBudgetError: if no shape meets the budget, with the range that can be reached and what binds.
    """
    state = SearchState(space, table, budget, effort or Effort(), narrower)
    check_feasible(state)
    state = state.of_worthwhile_depth()
    state.predict(quality)
    return best_of(state, quality, realise)


def best_of(state: State[S], quality: Losses[S], realise: Realise[S]) -> SearchResult:
    """
    The shape of least loss that meets the budget, of those of which losses are predicted.

    Args:
        state: what is known of them.
        quality: measures their losses.
        realise: builds and times them.

    Raises:
        InfeasibleBudgetError: if none that was timed met the budget.
    """
    effort = state.effort
    confirmed: set[int] = set()
    given_back = 0
    for number in range(1, effort.search_rounds + 1):
        fits = np.flatnonzero(state.fits())
        if len(fits) == 0:
            break
        loss = state.loss()
        ranked = fits[np.lexsort((state.ms()[fits], loss[fits]))]
        best = int(ranked[0])
        if best in confirmed:
            chosen = state.nearer(best)[: math.ceil(effort.candidates / 2)]
            if not chosen or given_back == GIVEN_BACK:
                return result_of(state, best, quality, number)
            given_back += 1
            _measure(
                state, chosen, quality, realise, f"round {number}: using more of the budget than {state.shape(best)}:"
            )
            continue
        if best in state.times or math.isinf(state.limit):
            logger.info("round %d: timing %s once more", number, state.shape(best))
            state.time([best], realise, final=True)
            state.evaluate(state.fitting([best]), quality)
            confirmed.add(best)
            continue
        # Once one has met the budget they lie close together, near what has been corrected.
        chosen = state.choose(ranked, math.ceil(effort.candidates / 2) if state.met else effort.candidates)
        _measure(state, chosen, quality, realise, f"round {number}: realising")
    return settle(state, quality, effort.search_rounds)


def _measure(state: State[S], chosen: list[int], quality: Losses[S], realise: Realise[S], words: str) -> None:
    """Time shapes, and measure the loss, which costs more, of those that meet the budget."""
    logger.info("%s %s", words, [state.shape(index) for index in chosen])
    state.time(chosen, realise)
    state.evaluate(state.fitting(chosen), quality)


def enough_for(effort: Effort, tables: Iterable[LatencyTable]) -> Effort:
    """The effort of a search by latency tables: twice as many shapes are timed where one of them is poor."""
    poor = next((table.poor for table in tables if table.poor), "")
    if not poor:
        return effort
    logger.warning("%s; twice as many shapes are timed directly", poor)
    return replace(effort, candidates=2 * effort.candidates, search_rounds=2 * effort.search_rounds)


def search_all_sizes(
    base: PreTrainedModel,
    budget: LatencyBudget,
    quality: RankedQuality,
    table: LatencyTable,
    sizes: Sequence[int],
    *,
    choose: bool,
    heads: Sequence[int] = (),
    untied: int = 0,
    effort: Effort,
    progress: Progress | None = None,
    kept: Kept | None = None,
) -> SearchResult:
    """
    `search` in the spaces of the dense hidden size and size of heads, and of narrower ones.

    Args:
        base: the dense model; only its class and config are used.
        budget: the limits.
        quality: the losses.
        table: of the dense sizes; its regime is that of the search.
        sizes: narrower hidden sizes, the largest first.
        choose: search of these only what may win (`worthwhile_sizes`).
        heads: smaller sizes of heads, the largest first; of these and of pairs with a hidden size only what may win is
            searched.
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

    def space_of(size: Shape, multiple: int) -> SearchSpace:
        return search_space(
            layout,
            regime,
            multiple=multiple,
            group_size=quality.scores.group_size,
            free=quality.free,
            hidden_size=size.hidden_size,
            head_dim=size.head_dim,
            untied=0 if size.hidden_size is None else untied,
        )

    spaces = [space_of(Shape(), table.multiple)]
    streams, features = [Shape(hidden_size=size) for size in sizes], [Shape(head_dim=size) for size in heads]
    if streams or features:
        narrow = NarrowTables(base, table, [*streams, *features], effort, progress=progress, kept=kept)
        spaces_of = cache(lambda size: space_of(size, narrow.multiple(size)))
        enough = cache(lambda size: narrow.meets(budget, spaces_of(size)))
        limit = math.inf
        if choose or features:
            limit = most_loss(SearchState(spaces[0], table, budget, effort), quality)
        streams = worthwhile_sizes(limit, quality, streams, enough) if choose else streams
        features = worthwhile_sizes(limit, quality, features, enough)
        for size in [*streams, *features, *both_narrower(limit, quality, streams, features, enough)]:
            tables.append(narrow(size))
            spaces.append(spaces_of(size))
    effort = enough_for(effort, [table])
    timer: Timer[Shape] = Timer(base, regime, effort.confirming(), progress=progress, kept=kept)
    narrower = list(zip(spaces[1:], tables[1:], strict=True))
    result = search(spaces[0], table, quality, budget, timer, effort=effort, narrower=narrower)
    kind = "directions of a basis" if quality.scores.rotated else "channels"
    inside = "directions of a basis inside each head"
    for axis, of, found, given in (
        ("hidden_size", kind, streams, sizes),
        ("head_dim", inside, features, heads),
    ):
        if given:
            words = f"{len(found) + 1} of {len(given) + 1} sizes, by {of}"
            if len(found) < len(given):
                words += "; the smaller ones cut more than the budget asks for"
            result = replace(result, steps={**result.steps, axis: words})
    warn_unsettled(*(each.unsettled for each in tables), timer.unsettled)
    return result
