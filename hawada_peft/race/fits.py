"""Which shapes meet a budget, by measured latency."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import cast

from transformers import PreTrainedModel

from ..latency.budget import LatencyBudget
from ..latency.effort import Effort
from ..planning.plan import Plan
from ..planning.towers import each_of
from ..progress import Progress
from ..search.timed import Timer, regime_of
from ..search.timed_models import realiser_of
from ..search.together import Numbers, Together
from ..vanilla.family import Layout, locate_all
from ..vanilla.resize import parameters_at
from ..vanilla.shape import Shape

logger = logging.getLogger(__name__)

Sizes = Shape | Together
"""A complete shape; of several towers, a complete shape of each."""

Stopwatch = Callable[[Sequence[Sizes]], Mapping[Sizes, float]]
"""Milliseconds of sizes, the dense ones beside them."""

Size = Callable[[Sizes], float]


@dataclass
class Fits:
    """
    The shapes that meet a budget; of a model with several towers, the shapes of all of them (`Together`). A shape is
    timed when it is first asked about, and never again.

    Args:
        dense (`Shape` or `Together`): the dense sizes, complete.
        time: builds shapes and times them beside the dense one; None if latency is not limited.
        limit: milliseconds at most, from the dense model's.
        tolerance: how far above it a shape may still be timed, in parts: models of one shape differ by where their
            weights lie in memory.
        sizes: further limits: a function of a shape, and what it gives at most.
        measured: shapes that were timed before, on the scale of `dense`'s entry.
        numbers: what several towers share.
    """

    dense: Sizes
    time: Stopwatch | None = None
    limit: Callable[[float], float] = lambda dense_ms: math.inf
    tolerance: float = 0.0
    sizes: Sequence[tuple[Size, float]] = ()
    measured: dict[Sizes, float] = field(default_factory=dict)
    numbers: Numbers = field(default_factory=partial(Numbers, {}))

    def __call__(self, shape: Sizes) -> bool:
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

    def ms(self, shape: Sizes) -> float:
        """The measured latency of a complete shape, on the scale of the first timing of the dense one."""
        if self.time is None:
            return math.inf
        self.look([shape])
        return self.measured[shape]

    def look(self, shapes: Sequence[Sizes]) -> None:
        """Time shapes side by side, if they were not timed yet."""
        missing = [shape for shape in dict.fromkeys(shapes) if shape not in self.measured]
        if not missing or self.time is None:
            return
        found = self.time(missing)
        dense = self.measured.get(self.dense, found[self.dense])
        for shape in (self.dense, *missing):
            self.measured.setdefault(shape, found[shape] * dense / found[self.dense])
        for shape in missing:
            logger.info("%s: %.4g ms, the dense model %.4g ms", shape, self.measured[shape], dense)

    def of_tower(self, number: int) -> Fits:
        """The shapes of one of the towers that meet the budget while the others are dense; of one tower the same."""
        dense = self.dense
        if not isinstance(dense, Together):
            return self

        def whole(shape: Sizes) -> Together:
            shapes = list(dense.shapes)
            shapes[number] = cast(Shape, shape)
            return self.numbers.complete(shapes)

        def time(shapes: Sequence[Sizes]) -> Mapping[Sizes, float]:
            everything = {shape: whole(shape) for shape in (*shapes, dense.shapes[number])}
            self.look(list(everything.values()))
            return {shape: self.ms(sizes) for shape, sizes in everything.items()}

        def size_of(size: Size) -> Size:
            return lambda shape: size(whole(shape))

        sizes = [(size_of(size), most) for size, most in self.sizes]
        return Fits(dense.shapes[number], None if self.time is None else time, self.limit, self.tolerance, sizes)


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
    The shapes that meet a budget on this machine, timed with random weights; those of all towers of `locate_all`.

    Args:
        dense: vanilla; only its class, config, dtype and device are used.
        budget: what the slim model may cost.
        tolerance: as in `Fits`.
        effort: how long shapes are timed, and by which clock.
        progress: makes progress bars, as `tqdm.tqdm`; none are shown if left out.
    """
    layouts, regime = locate_all(dense), regime_of(dense, budget)
    whole, built = as_sizes([layout.dense for layout in layouts]), realiser_of(layouts, regime)
    time: Stopwatch | None = None
    if math.isfinite(budget.limit_ms(1.0)):
        of = (whole, lambda sizes: built(shapes_of(sizes)))
        timer: Timer[Sizes] = Timer(dense, regime, effort or Effort(), of=of, progress=progress)

        def time(shapes: Sequence[Sizes]) -> Mapping[Sizes, float]:
            return {shape: each.median_ms for shape, each in timer(shapes).items()}

    weight = regime.torch_dtype.itemsize
    tokens = regime.batch_size * regime.cached_tokens

    def memory(sizes: Sizes) -> float:
        caches = sum(
            2.0
            * tokens
            * (shape.head_dim or layout.head_dim)
            * weight
            * (shape.num_key_value_heads or 0)
            * (shape.num_hidden_layers or 0)
            for layout, shape in zip(layouts, shapes_of(sizes), strict=True)
        )
        return weight * _parameters(layouts, sizes) + caches

    sizes: list[tuple[Size, float]] = []
    if budget.max_parameters is not None:
        sizes.append((partial(_parameters, layouts), budget.max_parameters))
    if budget.max_memory is not None:
        sizes.append((memory, budget.max_memory))
    return Fits(whole, time, budget.limit_ms, tolerance, sizes, numbers=Numbers.of(layouts))


def no_larger(dense: PreTrainedModel, sizes: Sizes) -> Fits:
    """The shapes with no more parameters than some sizes: what a race without a budget is about."""
    layouts = locate_all(dense)
    shapes = zip(layouts, shapes_of(sizes), strict=True)
    most = _parameters(layouts, as_sizes([layout.complete(shape) for layout, shape in shapes]))
    limits = [(partial(_parameters, layouts), most)]
    whole = as_sizes([layout.dense for layout in layouts])
    return Fits(whole, sizes=limits, numbers=Numbers.of(layouts))


def sizes_of(layouts: Sequence[Layout], plan: Plan) -> Sizes:
    """
    The complete sizes that a plan leaves of every tower.

    Raises:
        IncompatibleBaseError: as `each_of`.
    """
    pairs = each_of(layouts, plan)
    return as_sizes([layout.dense if part is None else layout.complete(part.shape) for layout, part in pairs])


def shapes_of(sizes: Sizes) -> tuple[Shape, ...]:
    """The shape of each tower."""
    return sizes.shapes if isinstance(sizes, Together) else (sizes,)


def as_sizes(shapes: Sequence[Shape]) -> Sizes:
    """The inverse of `shapes_of`."""
    return Together(tuple(shapes)) if len(shapes) > 1 else shapes[0]


def _parameters(layouts: Sequence[Layout], sizes: Sizes) -> int:
    first, *others = zip(layouts, shapes_of(sizes), strict=True)
    return parameters_at(*first, *others)
