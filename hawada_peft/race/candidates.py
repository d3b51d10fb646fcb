"""
Plans that may win a race. To add a source: a function of (judge, fits) to plans, and a line in `GENERATORS`.

Long because it lists the generators, each a few lines.

What generators give need not meet the budget: `field_of` sees to that, and to duplicates.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from ..errors import IllegalShapeError, InfeasibleBudgetError, UnsupportedModelError
from ..planning.plan import Plan
from ..planning.sizes import ffn_multiple
from ..planning.towers import check_towers
from ..search.result import Candidate as Timed
from ..search.result import SearchResult
from ..search.space import narrower_sizes
from ..vanilla.shape import Shape
from .fits import Fits, as_sizes, largest, sizes_of
from .judge import Judge

logger = logging.getLogger(__name__)
Generator = Callable[[Judge, Fits], Iterable[Plan]]

GIVEN = "given"
"""The source of plans that the caller has: those of trained gates."""

RESCORED = 8
"""Layers that are tried anew at each step of the greedy choice, and for each exchange: the cheapest before it."""

SEARCHED = 3
"""Shapes of a search that are entered at most."""


@dataclass(frozen=True)
class Candidate:
    """
    A plan that may win.

    Args:
        plan (`Plan`): what stays.
        source (`str`): where it comes from: a name in `GENERATORS`, or `GIVEN`.
        ms (`float`, *optional*): measured latency; None if it is not limited.
        loss (`float`): how far from the dense model (`Judge.loss`), cut and not trained.
    """

    plan: Plan
    source: str
    ms: float | None
    loss: float

    @property
    def depth_only(self) -> bool:
        """Whether layers go, and nothing else."""
        return all(
            replace(part.shape, num_hidden_layers=None) == replace(part.dense, num_hidden_layers=None)
            for part in self.plan.parts
        )


def each_tower(judge: Judge, fits: Fits) -> list[tuple[Judge, Fits]]:
    """Of every tower its judge, and what meets the budget while the others are dense."""
    return [(tower, fits.of_tower(number)) for number, tower in enumerate(judge.towers)]


def deepest(judge: Judge, fits: Fits) -> int:
    """The most layers of full width that meet the budget; 0 if one layer does not."""
    dense = judge.layout.dense
    counts = range(1, judge.layers)
    return largest(counts, lambda count: fits(replace(dense, num_hidden_layers=count))) or 0


def runs_of(judge: Judge, kept: int) -> list[range]:
    """Every run of adjacent layers without which a number of layers is left."""
    length = judge.layers - kept
    return [range(start, start + length) for start in range(judge.layers - length + 1)]


def best_run(judge: Judge, kept: int) -> range:
    """The run of them that costs least when it is cut."""
    return min(runs_of(judge, kept), key=lambda gone: judge.loss(judge.without(gone)))


def runs(judge: Judge, fits: Fits) -> Iterator[Plan]:
    """
    Without one run of adjacent layers: every run of the fewest layers that must go.

    References:
        Sreenivas et al., "LLM Pruning and Distillation in Practice: The Minitron Approach" (2024).
    """
    kept = deepest(judge, fits)
    if kept:
        yield from (judge.without(gone) for gone in runs_of(judge, kept))


def broken_runs(judge: Judge, fits: Fits) -> Iterator[Plan]:
    """Without the run of least loss that is one layer shorter than must go, and without the cheapest further layer."""
    kept = deepest(judge, fits)
    if 0 < kept < judge.layers - 1:
        run = best_run(judge, kept + 1)
        rest = [layer for layer in range(judge.layers) if layer not in run and layer not in (run.start - 1, run.stop)]
        if rest:
            yield min((judge.without([*run, layer]) for layer in rest), key=judge.loss)


def greedy(judge: Judge, fits: Fits) -> Iterator[Plan]:
    """
    Without the layers that cost least, taken one after the other, those that are left judged anew each time.

    References:
        Song et al., "SLEB: Streamlining LLMs through Redundancy Verification and Elimination of Transformer Blocks"
        (2024).
    """
    kept = deepest(judge, fits)
    gone, _ = _cheapest(judge, judge.layers - kept if kept else 0)
    if gone:
        yield judge.without(gone)


def swaps(judge: Judge, fits: Fits) -> Iterator[Plan]:
    """
    The greedy choice, bettered: each layer that went comes back if without another one the loss is lower, again and
    again until no exchange lowers it. What goes first, while the others are there, need not go best with them gone.
    """
    kept = deepest(judge, fits)
    gone, last = _cheapest(judge, judge.layers - kept if kept else 0)
    before = math.inf
    while gone and (best := judge.loss(judge.without(gone))) < before:
        before = best
        for layer in tuple(gone):
            rest = [each for each in gone if each != layer]
            losses = _without_one(
                judge, rest, sorted(set(range(judge.layers)) - set(gone), key=last.__getitem__)[:RESCORED]
            )
            last |= losses
            cheapest = min(losses, key=losses.__getitem__)
            if losses[cheapest] < best:
                gone, best = [*rest, cheapest], losses[cheapest]
    if gone:
        yield judge.without(gone)


def _cheapest(judge: Judge, count: int) -> tuple[list[int], dict[int, float]]:
    """The layers of the greedy choice in the order they went, and of every layer the loss when it was last tried."""
    gone: list[int] = []
    last: dict[int, float] = {}
    while len(gone) < count:
        left = [layer for layer in range(judge.layers) if layer not in gone]
        tried = sorted(left, key=lambda layer: last.get(layer, 0.0))[: RESCORED if last else None]
        losses = _without_one(judge, gone, tried)
        last |= losses
        gone.append(min(losses, key=losses.__getitem__))
    return gone, last


def _without_one(judge: Judge, gone: Sequence[int], tried: Iterable[int]) -> dict[int, float]:
    """Of each layer the loss when it goes beside those that are gone."""
    return {layer: judge.loss(judge.without([*gone, layer])) for layer in tried}


def influence(judge: Judge, fits: Fits) -> Iterator[Plan]:
    """
    Without the layers that turn the residual stream least.

    References:
        Men et al., "ShortGPT" (2024).
    """
    kept = deepest(judge, fits)
    if kept:
        order = sorted(range(judge.layers), key=lambda layer: judge.influence[layer])
        yield judge.without(order[: judge.layers - kept])


def widths(judge: Judge, fits: Fits) -> Iterator[Plan]:
    """
    With more layers than depth alone leaves, and the widest FFN that then meets the budget: one layer more, half as
    many more as there are, and all. The layers that go are the run of least loss.
    """
    layout = judge.layout
    kept, total = deepest(judge, fits), judge.layers
    dense = layout.dense.sizes()["intermediate_size"]
    step = ffn_multiple(dense, layout, 1)
    shapes = [Shape(intermediate_size=size) for size in range(step, dense, step)]
    yield from _deeper(judge, fits, (kept + 1, (kept + total + 1) // 2, total), shapes)


def directions(judge: Judge, fits: Fits) -> Iterator[Plan]:
    """
    With more layers than depth alone leaves, and the most directions of the residual stream that then meet the budget:
    half as many more layers as there are, and all. Nothing where the stream has no basis; nor where parameters are
    limited and embeddings would be untied.

    References:
        Ashkboos et al., "SliceGPT" (2024), for cutting the stream in a basis.
    """
    if judge.bases.stream is None:
        return
    kept, total = deepest(judge, fits), judge.layers
    shapes = [judge.layout.narrowed(size) for size in reversed(narrower_sizes(judge.layout))]
    for plan in _deeper(judge, fits, ((kept + total + 1) // 2, total), shapes):
        if not (fits.sizes and judge.unties(plan)):
            yield plan


def _deeper(judge: Judge, fits: Fits, counts: Iterable[int], widths: Sequence[Shape]) -> Iterator[Plan]:
    """At numbers of layers, without the run of least loss, the last of rising widths that meets the budget."""
    dense = judge.layout.dense
    for count in dict.fromkeys(counts):
        wide = [replace(width, num_hidden_layers=count) for width in widths]
        place = largest(range(len(wide)), lambda place, wide=wide: fits(wide[place].complete(dense)))  # type: ignore[misc]
        if place is not None:
            gone = best_run(judge, count) if count < judge.layers else range(0)
            yield judge.at(wide[place], gone)


def runs_together(judge: Judge, fits: Fits) -> Iterator[Plan]:
    """
    Without a run of adjacent layers of every one of several towers, that of least loss: as many layers as must go if
    all towers lose the same part of theirs, and if one loses twice the others' part. Nothing of one tower.
    """
    dense, count = [layout.dense for layout in judge.layouts], len(judge.layouts)
    depths = [tower.layers for tower in judge.towers]
    for first in range(count + 1) if count > 1 else ():
        weights = [1.0 if first in (number, count) else 0.5 for number in range(count)]

        def left(part: float, weights: list[float] = weights) -> tuple[int, ...]:
            return tuple(
                max(1, depth - round(weight * part * depth)) for weight, depth in zip(weights, depths, strict=True)
            )

        most = max(depths)
        rising = list(dict.fromkeys(left(gone / most) for gone in range(most, 0, -1)))
        sizes = [
            fits.numbers.complete([replace(s, num_hidden_layers=n) for s, n in zip(dense, some, strict=True)])
            for some in rising
        ]
        place = largest(range(len(sizes)), lambda place, sizes=sizes: fits(sizes[place]))  # type: ignore[misc]
        some = () if place is None else rising[place]
        parts = [
            tower.without(best_run(tower, kept))
            for tower, kept in zip(judge.towers, some, strict=False)
            if kept < tower.layers
        ]
        if len(parts) > 1:
            yield Plan.of_towers(parts)


def searched(result: SearchResult) -> Generator:
    """The answer of a search, and the best of the other shapes that it timed, without the greedily chosen layers."""

    def shapes(judge: Judge, each: Timed) -> list[Shape]:
        if len(judge.layouts) == 1:
            return [each.shape]
        named = {result.plan.tower: each.shape, **dict(each.beside)}
        return [named.get(layout.tower, layout.dense) for layout in judge.layouts]

    def generate(judge: Judge, fits: Fits) -> Iterator[Plan]:
        if result.plan is not None and judge.knows(result.plan.shape):
            yield result.plan
        timed = sorted(
            (each for each in result.measured if each.measured_loss is not None and each.sizes != result.best.sizes),
            key=lambda each: each.measured_loss or 0.0,
        )
        timed = [each for each in timed if judge.knows(each.shape)]
        for some in [some for each in timed if fits(as_sizes(some := shapes(judge, each)))][: SEARCHED - 1]:
            parts = []
            for tower, shape in zip(judge.towers, some, strict=True):
                order = sorted(range(tower.layers), key=lambda layer, tower=tower: tower.influence[layer])  # type: ignore[misc]
                parts.append(tower.part(shape, order[: tower.layers - shape.sizes()["num_hidden_layers"]]))
            yield Plan.of_towers(parts)

    return generate


RUNS, DIRECTIONS = "runs of layers", "depth and directions"

GENERATORS: dict[str, Generator] = {
    RUNS: runs,
    "a run and a layer": broken_runs,
    "greedy": greedy,
    "swaps": swaps,
    "influence": influence,
    "depth and width": widths,
    DIRECTIONS: directions,
}
"""Where the plans of a race come from. What recovers as if it were another's comes from the first of them."""

TOGETHER: dict[str, Generator] = {RUNS: runs_together}
"""Further plans of these sources, of a whole model; the others are asked about each of its towers."""


def field_of(
    judge: Judge,
    fits: Fits,
    generators: Mapping[str, Generator] | None = None,
    *,
    together: Mapping[str, Generator] | None = None,
    given: Sequence[Plan] = (),
    most: int = 6,
    few: int = 2,
) -> list[Candidate]:
    """
    The plans that enter a race.

    All plans that meet the budget, without duplicates and without those that another dominates: that keeps the same
    layers, is nowhere narrower and is not slower. Of each source the `few` of least loss; of these the best of each
    source, by their loss, then the second of each, `most` in all. Plans that are given, the best one by depth alone
    and the best run of layers, which recovers better than its loss says, are always among them. A source that cannot
    tell of a model, or of a tower, gives no plans of it.

    Args:
        judge: of the model.
        fits: of the budget.
        generators: sources by name, asked about each tower, while the others stay whole; `GENERATORS` if left out.
        together: sources asked about all towers at once; `TOGETHER` if left out.
        given: plans that the caller has; those that do not meet the budget do not enter.
        most: plans at most.
        few: plans of one source at most.

    Raises:
        InfeasibleBudgetError: if no plan meets the budget.
    """
    seen: set[Plan] = set()
    found: dict[str, list[Candidate]] = {}
    alone, together = GENERATORS if generators is None else generators, TOGETHER if together is None else together
    for source in (GIVEN, *dict.fromkeys((*alone, *together))):
        plans = [*given] if source == GIVEN else []
        plans += [plan for each in each_tower(judge, fits) for plan in _made(source, alone, *each)]
        plans += _made(source, together, judge, fits)
        # What a plan says of towers that stay as they are does not tell it from others.
        cut = dict.fromkeys(Plan.of_towers(plan.cut_parts) for plan in plans if not plan.keeps_all)
        new = [plan for plan in cut if plan not in seen and _enters(judge, fits, plan)]
        seen.update(new)
        ms = [None if fits.time is None else fits.ms(sizes_of(judge.layouts, plan)) for plan in new]
        entered = [Candidate(plan, source, each, judge.loss(plan)) for plan, each in zip(new, ms, strict=True)]
        found[source] = sorted(entered, key=lambda each: each.loss)
        logger.info("%s: %d plans meet the budget", source, len(new))
    everyone = [each for entered in found.values() for each in entered]
    if not everyone:
        raise InfeasibleBudgetError(
            "no plan meets the budget: dropping layers does not reach it, nor do narrower FFNs. Ask for less, or pass "
            "a plan that meets it (of `find_plan`, which also cuts heads)"
        )
    undominated = {
        source: [each for each in entered if not any(_dominates(other, each) for other in everyone)][:few]
        for source, entered in found.items()
    }
    chosen = list(undominated.pop(GIVEN))
    depth = min((each for each in everyone if each.depth_only), key=lambda each: each.loss, default=None)
    if depth is not None and depth not in chosen:
        chosen.append(depth)
    chosen += [each for each in found.get(RUNS, ())[:1] if each not in chosen and len(chosen) < most]
    for place in range(few):
        places = (entered[place] for entered in undominated.values() if place < len(entered))
        for each in sorted(places, key=lambda each: each.loss):
            if each not in chosen and len(chosen) < most:
                chosen.append(each)
    return chosen


def neighbours(judge: Judge, fits: Fits) -> list[Candidate]:
    """
    The nearest whole numbers of layers on both sides of the budget, each without its run of least loss: that of one
    layer more than meets the budget, and of one less.
    """
    found = []
    for tower, alone in each_tower(judge, fits):
        kept = deepest(tower, alone)
        for count in (kept + 1, kept - 1) if kept or len(judge.layouts) == 1 else ():
            if 0 < count < tower.layers:
                plan = tower.without(best_run(tower, count))
                ms = None if fits.time is None else fits.ms(sizes_of(judge.layouts, plan))
                found.append(Candidate(plan, "neighbour", ms, judge.loss(plan)))
    return found


def _made(source: str, generators: Mapping[str, Generator], judge: Judge, fits: Fits) -> list[Plan]:
    """What a source gives, if it is among some, and can tell of the model."""
    try:
        return list(generators[source](judge, fits)) if source in generators else []
    except UnsupportedModelError as error:
        logger.info("%s: no plans of %s: %s", source, judge.layout.tower or "the model", error)
        return []


def _enters(judge: Judge, fits: Fits, plan: Plan) -> bool:
    try:
        check_towers(judge.layouts, plan)
    except IllegalShapeError as error:
        logger.info("%s does not enter: %s", plan, error)
        return False
    return fits(sizes_of(judge.layouts, plan))


def _dominates(one: Candidate, other: Candidate) -> bool:
    """Whether one keeps the same layers, is nowhere narrower, somewhere wider, and not slower."""
    if _layers(one.plan) != _layers(other.plan):
        return False
    mine, theirs = _narrowed(one.plan), _narrowed(other.plan)
    slower = one.ms is not None and other.ms is not None and one.ms > other.ms
    return all(size >= theirs.get(name, math.inf) for name, size in mine.items()) and mine != theirs and not slower


def _layers(plan: Plan) -> dict[str, tuple[int, ...]]:
    """The layers that stay, of every tower that loses some."""
    depths = {part.tower: part.dense.sizes()["num_hidden_layers"] for part in plan.parts}
    return {part.tower: part.layers for part in plan.parts if len(part.layers) < depths[part.tower]}


def _narrowed(plan: Plan) -> dict[tuple[str, str], int]:
    """The sizes that are smaller than the dense ones, of every tower."""
    return {
        (part.tower, name): size
        for part in plan.parts
        for name, size in part.shape.to_dict().items()
        if size != part.dense.to_dict().get(name)
    }
