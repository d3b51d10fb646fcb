"""Which shapes meet a budget, by measured latency."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from transformers import PreTrainedModel

from ..latency.budget import LatencyBudget
from ..latency.effort import Effort
from ..progress import Progress
from ..search.timed import Timer, regime_of
from ..vanilla.family import locate
from ..vanilla.resize import parameters_at
from ..vanilla.shape import Shape

logger = logging.getLogger(__name__)

Stopwatch = Callable[[Sequence[Shape]], Mapping[Shape, float]]
"""Milliseconds of complete shapes, the dense one beside them."""

Size = Callable[[Shape], float]


@dataclass
class Fits:
    """
    The shapes that meet a budget. A shape is timed when it is first asked about, and never again.

    Args:
        dense (`Shape`): the dense sizes, complete.
        time: builds shapes and times them beside the dense one; None if latency is not limited.
        limit: milliseconds at most, from the dense model's.
        tolerance: how far above it a shape may still be timed, in parts: models of one shape differ by where their
            weights lie in memory.
        sizes: further limits: a function of a shape, and what it gives at most.
        measured: shapes that were timed before, on the scale of `dense`'s entry.
    """

    dense: Shape
    time: Stopwatch | None = None
    limit: Callable[[float], float] = lambda dense_ms: math.inf
    tolerance: float = 0.0
    sizes: Sequence[tuple[Size, float]] = ()
    measured: dict[Shape, float] = field(default_factory=dict)

    def __call__(self, shape: Shape) -> bool:
        """Whether all limits hold for a complete shape."""
        if any(size(shape) > most for size, most in self.sizes):
            return False
        return self.time is None or self.ms(shape) <= self.limit_ms * (1 + self.tolerance)

    @property
    def dense_ms(self) -> float:
        """Of the dense model; infinite if nothing is timed."""
        return self.ms(self.dense)

    @property
    def limit_ms(self) -> float:
        """What the budget allows; infinite if it does not limit latency."""
        return math.inf if self.time is None else self.limit(self.dense_ms)

    def ms(self, shape: Shape) -> float:
        """The measured latency of a complete shape, on the scale of the first timing of the dense one."""
        if self.time is None:
            return math.inf
        self.look([shape])
        return self.measured[shape]

    def look(self, shapes: Sequence[Shape]) -> None:
        """Time shapes side by side, if they were not timed yet."""
        missing = [shape for shape in dict.fromkeys(shapes) if shape not in self.measured]
        if not missing or self.time is None:
            return
        found = self.time(missing)
        dense = self.measured.get(self.dense, found[self.dense])
        for shape in (self.dense, *missing):
            self.measured.setdefault(shape, found[shape] * dense / found[self.dense])
        for shape in missing:
            logger.info("%s: %.4g ms, the dense model %.4g ms", shape.to_dict(), self.measured[shape], dense)


def largest(values: Sequence[int], fits: Callable[[int], bool]) -> int | None:
    """
    The largest of rising values that fits, where all below one that fits fit as well; None if none does.

    It is looked for by halving.
    """
    low, high = -1, len(values)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(values[middle]) else (low, middle)
    return None if low < 0 else values[low]


def fits_of(
    dense: PreTrainedModel,
    budget: LatencyBudget,
    *,
    tolerance: float = 0.0,
    effort: Effort | None = None,
    progress: Progress | None = None,
) -> Fits:
    """
    The shapes that meet a budget on this machine, timed with random weights.

    Args:
        dense: vanilla; only its class, config, dtype and device are used.
        budget: what the slim model may cost.
        tolerance: as in `Fits`.
        effort: how long shapes are timed, and by which clock.
        progress: makes progress bars, as `tqdm.tqdm`; none are shown if left out.
    """
    layout, regime = locate(dense), regime_of(dense, budget)
    time: Stopwatch | None = None
    if math.isfinite(budget.limit_ms(1.0)):
        timer: Timer[Shape] = Timer(dense, regime, effort or Effort(), progress=progress)

        def time(shapes: Sequence[Shape]) -> Mapping[Shape, float]:
            return {shape: each.median_ms for shape, each in timer(shapes).items()}

    weight = regime.torch_dtype.itemsize
    tokens = regime.batch_size * regime.cached_tokens
    cache = 2.0 * tokens * layout.head_dim * weight

    def memory(shape: Shape) -> float:
        sizes = shape.sizes()
        return (
            weight * parameters_at(layout, shape) + cache * sizes["num_key_value_heads"] * sizes["num_hidden_layers"]
        )

    sizes: list[tuple[Size, float]] = []
    if budget.max_parameters is not None:
        sizes.append((partial(parameters_at, layout), budget.max_parameters))
    if budget.max_memory is not None:
        sizes.append((memory, budget.max_memory))
    return Fits(layout.dense, time, budget.limit_ms, tolerance, sizes)


def no_larger(dense: PreTrainedModel, shape: Shape) -> Fits:
    """The shapes with no more parameters than one: what a race without a budget is about."""
    layout = locate(dense)
    most = parameters_at(layout, layout.complete(shape))
    return Fits(layout.dense, sizes=[(partial(parameters_at, layout), most)])
