"""Which narrower hidden sizes are worth a search: those that a budget needs, and that may win."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from ..vanilla.shape import Shape
from .masked import DOUBT
from .quality import Quality
from .state import SearchState

logger = logging.getLogger(__name__)


def needed_sizes(sizes: Sequence[int], state_of: Callable[[int], SearchState]) -> list[int]:
    """
    The hidden sizes that a budget may need: none below the first one at which the largest shape surely meets it.

    Of two shapes that differ in their hidden size alone the wider one loses less.

    Args:
        sizes: in descending order.
        state_of: by the hidden size, its shapes with their latencies, nothing timed.
    """
    found: list[int] = []
    for size in sizes:
        found.append(size)
        state = state_of(size)
        if state.surely()[int(state.parameters.argmax())]:
            logger.info("the hidden size %d alone meets the budget: smaller ones are left out", size)
            break
    return found


def worthwhile_sizes(state: SearchState, quality: Quality, sizes: Sequence[int]) -> list[int]:
    """
    The hidden sizes at which a shape may lose less than the best one of the dense hidden size that meets the budget.

    Whatever else is cut, a shape loses no less than its hidden size does alone. So none counts that alone loses more
    than that best shape is predicted to lose, times `DOUBT`; nor does any smaller one.

    Args:
        state: of the dense hidden size, nothing timed.
        quality: the losses. What it measures here the search asks for again.
        sizes: in descending order.

    Returns:
        The first of them; all, if no shape of the dense hidden size meets the budget.
    """
    if not state.fits().any():
        return list(sizes)
    state = state.of_worthwhile_depth()
    state.predict(quality)
    limit = DOUBT * float(state.predicted[state.fits()].min())
    found: list[int] = []
    for size in sizes:
        loss = quality.evaluate(Shape(hidden_size=size))
        if loss is not None and loss > limit:
            logger.info("a hidden size of %d alone loses %.4g, more than %.4g: it is left out", size, loss, limit)
            break
        found.append(size)
    return found
