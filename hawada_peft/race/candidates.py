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

from ..errors import IllegalShapeError, InfeasibleBudgetError
from ..planning.plan import Plan
from ..planning.sizes import ffn_multiple
from ..search.result import SearchResult
from ..search.space import narrower_sizes
from ..vanilla.legality import check_legal
from ..vanilla.shape import Shape
from .fits import Fits, largest
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
        return replace(self.plan.shape, num_hidden_layers=None) == replace(self.plan.dense, num_hidden_layers=None)


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


def searched(result: SearchResult) -> Generator:
    """The answer of a search, and the best of the other shapes that it timed, without the greedily chosen layers."""

    def generate(judge: Judge, fits: Fits) -> Iterator[Plan]:
        if result.plan is not None and judge.knows(result.plan.shape):
            yield result.plan
        timed = sorted(
            (each for each in result.measured if each.measured_loss is not None and each.shape != result.best.shape),
            key=lambda each: each.measured_loss or 0.0,
        )
        timed = [each for each in timed if judge.knows(each.shape)]
        for each in [each for each in timed if fits(each.shape)][: SEARCHED - 1]:
            order = sorted(range(judge.layers), key=lambda layer: judge.influence[layer])
            gone = judge.layers - each.shape.sizes()["num_hidden_layers"]
            yield judge.at(each.shape, order[:gone])

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


def field_of(
    judge: Judge,
    fits: Fits,
    generators: Mapping[str, Generator] | None = None,
    *,
    given: Sequence[Plan] = (),
    most: int = 6,
    few: int = 2,
) -> list[Candidate]:
    """
    The plans that enter a race.

    All plans that meet the budget, without duplicates and without those that another dominates: that keeps the same
    layers, is nowhere narrower and is not slower. Of each source the `few` of least loss; of these the best of each
    source, by their loss, then the second of each, `most` in all. Plans that are given, the best one by depth alone
    and the best run of layers, which recovers better than its loss says, are always among them.

    Args:
        judge: of the model.
        fits: of the budget.
        generators: sources by name; `GENERATORS` if left out.
        given: plans that the caller has; those that do not meet the budget do not enter.
        most: plans at most.
        few: plans of one source at most.

    Raises:
        InfeasibleBudgetError: if no plan meets the budget.
    """
    sources = {GIVEN: given} | {
        name: generate(judge, fits) for name, generate in (GENERATORS if generators is None else generators).items()
    }
    seen: set[Plan] = set()
    found: dict[str, list[Candidate]] = {}
    for source, plans in sources.items():
        new = [
            plan
            for plan in dict.fromkeys(plans)
            if plan not in seen and not plan.keeps_all and _enters(judge, fits, plan)
        ]
        seen.update(new)
        ms = [None if fits.time is None else fits.ms(plan.shape) for plan in new]
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
    kept, found = deepest(judge, fits), []
    for count in (kept + 1, kept - 1):
        if 0 < count < judge.layers:
            plan = judge.without(best_run(judge, count))
            ms = None if fits.time is None else fits.ms(plan.shape)
            found.append(Candidate(plan, "neighbour", ms, judge.loss(plan)))
    return found


def _enters(judge: Judge, fits: Fits, plan: Plan) -> bool:
    try:
        check_legal(judge.layout, plan.shape)
    except IllegalShapeError as error:
        logger.info("%s does not enter: %s", plan, error)
        return False
    return fits(judge.layout.complete(plan.shape))


def _dominates(one: Candidate, other: Candidate) -> bool:
    """Whether one keeps the same layers, is nowhere narrower, somewhere wider, and not slower."""
    if one.plan.layers != other.plan.layers:
        return False
    mine, theirs = ({"hidden_size": math.inf} | each.plan.shape.to_dict() for each in (one, other))  # of the dense
    slower = one.ms is not None and other.ms is not None and one.ms > other.ms
    return all(mine[name] >= size for name, size in theirs.items()) and mine != theirs and not slower
