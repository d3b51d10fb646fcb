"""What a search answers: the best shape that was timed and met the budget, or why there is none."""

from __future__ import annotations

import logging
import math
from typing import Any

import numpy as np

from ..errors import InfeasibleBudgetError
from .result import Candidate, SearchResult
from .state import Losses, S, State

logger = logging.getLogger(__name__)


def check_feasible(state: State[Any]) -> None:
    """
    Raises:
        InfeasibleBudgetError: if no shape meets the budget by the table, with the range and what binds.
    """
    if state.fits().any():
        return
    fast = state.ms() <= state.limit * (1 - state.effort.margin)
    small = state.small()
    binding = []
    if not fast.any():
        binding.append("latency")
    if not small.any():
        binding.append("size")
    together = "" if binding else " Each limit can be met, but not all of them by one shape."
    dense, least = state.table.dense_ms, float(state.ms().min())
    asked = f" (asked: {state.limit:.3f} ms)" if math.isfinite(state.limit) else ""
    raise InfeasibleBudgetError(
        f"no legal shape meets the budget ({state.budget}); binding: {' and '.join(binding) or 'both together'}."
        f"{together} Reachable on {state.table.device_name} ({state.table.regime}): {least:.3f} to {dense:.3f} ms, "
        f"a speedup of 1 to {dense / least:.2f}{asked}; "
        f"{int(state.parameters.min()):,} to {int(state.parameters.max()):,} parameters; "
        f"{state.memory.min() / 2**20:,.1f} to {state.memory.max() / 2**20:,.1f} MiB. Ask for less, or "
        "give the search more to cut (the config's `gates`)."
    )


def settle(state: State[S], quality: Losses[S], rounds: int) -> SearchResult:
    """
    The rounds are used up: the best of the shapes that were timed and met the budget.

    Raises:
        InfeasibleBudgetError: if none did.
    """
    fits, loss = state.fits(), state.loss()
    met = [index for index in state.times if fits[index]]
    if met:
        return result_of(state, min(met, key=lambda index: loss[index]), quality, rounds)
    least = min(state.times.values(), default=float(state.ms().min()))
    raise InfeasibleBudgetError(
        f"no shape that was built and timed met the budget ({state.budget}): the fastest took {least:.3f} ms, "
        f"{state.limit:.3f} ms was asked for, dense {state.table.dense_ms:.3f} ms. Ask for less, or measure on a "
        "quieter machine."
    )


def result_of(state: State[S], index: int, quality: Losses[S], rounds: int) -> SearchResult:
    """What is returned for a shape."""
    ms, loss = state.ms(), state.loss()
    scale = state.dense_ms / state.table.dense_ms

    def candidate(place: int) -> Candidate:
        timed, expected = state.times.get(place), state.expected_ms.get(place)
        shape, beside = state.sizes(place)
        return Candidate(
            shape=shape,
            beside=tuple(beside.items()),
            estimate_ms=float(ms[place]) * scale,
            predicted_loss=float(loss[place]),
            parameters=int(state.parameters[place]),
            memory=float(state.memory[place]),
            measured_ms=None if timed is None else timed * scale,
            measured_loss=state.losses.get(place),
            expected_ms=None if expected is None else expected * scale,
            expected_loss=state.expected_loss.get(place),
            rejected=None if place == index else _rejected(state, place, loss, index),
        )

    result = SearchResult(
        budget=state.budget,
        best=candidate(index),
        plan=quality.plan(state.shape(index)),
        dense_ms=state.dense_ms,
        limit_ms=state.limit * scale,
        frontier=tuple(candidate(int(place)) for place in frontier(ms, loss)),
        measured=tuple(candidate(place) for place in state.times),
        table=state.table,
        rounds=rounds,
        margin=state.effort.margin,
        shapes=state.shapes,
        steps=state.steps,
        loss=quality.meaning,
    )
    logger.info("%s", result)
    return result


def _rejected(state: State[Any], index: int, loss: np.ndarray, best: int) -> str:
    """Why another shape was chosen."""
    ms, parameters, memory = state.ms()[index], state.budget.max_parameters, state.budget.max_memory
    room = state.room()[index]
    reasons = []
    if ms > state.limit:
        reasons.append("slower than the budget")
    elif ms > state.limit * room:
        reasons.append(f"within the budget, but not by the margin of {1 - room:.1%}")
    if parameters is not None and state.parameters[index] > parameters:
        reasons.append("too many parameters")
    if memory is not None and state.memory[index] > memory:
        reasons.append("too much memory")
    if reasons:
        return ", ".join(reasons)
    if loss[index] < loss[best]:
        return "not timed and confirmed before the rounds were used up"
    return "no less loss than the chosen shape"


def frontier(ms: np.ndarray, loss: np.ndarray) -> np.ndarray:
    """
    The shapes that no other beats in both latency and loss.

    Args:
        ms, loss: (shapes,).

    Returns:
        Indices, the slowest and best first.
    """
    order = np.lexsort((loss, ms))
    best = np.minimum.accumulate(loss[order])
    keep = np.concatenate([[True], loss[order][1:] < best[:-1]])
    return order[keep][::-1]
