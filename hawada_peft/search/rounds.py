"""The search for the shape: every legal one under the budget, scored, realised and timed until one meets it."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

import numpy as np

from ..latency.budget import LatencyBudget
from ..latency.effort import Effort
from ..latency.table import LatencyTable
from ..vanilla.shape import Shape
from .answer import check_feasible, result_of, settle
from .quality import Losses, Quality
from .result import SearchResult
from .space import SearchSpace
from .state import Realise, S, SearchState, State

logger = logging.getLogger(__name__)


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
        narrower: the shapes of other hidden sizes, and their tables; searched together with the rest.

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
    for number in range(1, effort.search_rounds + 1):
        fits = np.flatnonzero(state.fits())
        if len(fits) == 0:
            break
        loss = state.loss()
        ranked = fits[np.lexsort((state.ms()[fits], loss[fits]))]
        best = int(ranked[0])
        if best in confirmed:
            return result_of(state, best, quality, number)
        if best in state.times or math.isinf(state.limit):
            logger.info("round %d: timing %s once more", number, state.shape(best))
            state.time([best], realise, final=True)
            state.evaluate([best], quality)
            confirmed.add(best)
            continue
        # Later ones lie close together, near what the first have corrected.
        chosen = state.choose(ranked, math.ceil(effort.candidates / 2) if state.times else effort.candidates)
        logger.info("round %d: realising %s", number, [state.shape(index) for index in chosen])
        state.evaluate(chosen, quality)
        state.time(chosen, realise)
    return settle(state, quality, effort.search_rounds)
