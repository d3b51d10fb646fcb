"""What a search will cost, said before it is spent: the first batch and a call of the dense model are timed."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Any

import torch

from ..latency.clock import Clock
from ..search.directions import may_narrow_heads
from ..search.masked import RESCORED
from ..search.reference import judged_predictions, ranked_predictions
from ..search.timed import check_regime, regime_of
from ..search.timed_models import realiser
from ..vanilla.batches import on_device
from ..vanilla.family import locate
from .tables import spoken

if TYPE_CHECKING:
    from peft import PeftModel

    from ..latency.budget import LatencyBudget
    from ..latency.effort import Effort
    from .shared import Batches

SPARE = 1.3
"""Layers that are dropped for a speedup, by those that a model of equal layers and nothing else would have to drop."""

BACKWARD = 3
"""A pass with gradients, in passes without: importance takes one, and a basis another."""

ANEW = 0.6
"""The part of a pass that is computed where a layer is tried: those before it are known (`Prefix`)."""

REFITTED, SHAPES = 4, 16
"""A refitted model, in passes of the dense one, and how many a search judges."""

CALLS, OF_HEADS = 700, 250
"""
What tables, candidates and the last timings of a search take, in calls of the dense model; and what tables of narrower
heads take, where there can be some.
"""


def expected_of(
    model: PeftModel,
    batches: Batches,
    budget: LatencyBudget,
    effort: Effort,
    *,
    refit: bool,
    rotate: bool | None = None,
) -> str:
    """
    About how long a search takes, by what it is spent on, and what is held in memory, in a line.

    Args:
        model: with gates.
        batches: of the calibration.
        budget: how far layers may be dropped.
        effort: by which clock it is timed.
        refit: whether shapes are judged by refitted models.
        rotate: as in `find_plan`.
    """
    base: Any = model.get_base_model()
    towers = check_regime(base, regime_of(model, budget))
    part = 1 - 1 / budget.speedup if budget.speedup else 1 - (budget.fraction or 0.5)
    passes = 0
    for layers in (layout.dense.sizes()["num_hidden_layers"] for layout in towers):
        dropped = min(layers - 1, math.ceil(SPARE * part * layers))
        passes += layers + RESCORED * max(0, dropped - 1)
    batch = on_device(batches[0], base.device)
    with torch.inference_mode():
        model(**batch)
        begun = time.perf_counter()
        output = model(**batch)
    once = time.perf_counter() - begun
    each = max(1, _predictions(output))
    ranking, judged = (
        min(len(batches), math.ceil(most(model) / each)) for most in (ranked_predictions, judged_predictions)
    )
    narrowed = len(towers) == 1 and may_narrow_heads(model, rotate)
    judging = SHAPES * (REFITTED * judged if refit else len(batches))
    spent = {
        "to rank units and find a basis": 2 * BACKWARD * len(batches) * once,
        f"to rank layers ({passes} times {ranking} of {len(batches)} batches)": ANEW * passes * ranking * once,
        f"to judge {SHAPES} shapes or so": judging * once,
    }
    if not effort.clock.elsewhere:
        calls = CALLS * len(towers) + OF_HEADS * narrowed
        spent["to measure latencies (less once the tables of this model are kept)"] = calls * _call(model, budget)
    weights = sum(each.numel() * each.element_size() for each in base.parameters())
    examples = sum(len(next(iter(batch.values()))) for batch in batches)
    parts = ", ".join(f"{spoken(seconds)} {what}" for what, seconds in spent.items())
    return (
        f"{examples} examples; about {spoken(sum(spent.values()))} as fast as the machine is now: {parts}. "
        f"Weights: {weights / 2**30:.2f} GiB, at times twice."
    )


def _call(model: PeftModel, budget: LatencyBudget) -> float:
    """The seconds of a call of the dense model."""
    base, regime, clock = model.get_base_model(), regime_of(model, budget), Clock()
    layout = locate(base)
    built, seconds, took = realiser(layout, regime)(layout.dense), 0.0, 0.0
    for times, part in regime.parts():
        runner = clock.runner(built, part)
        with torch.inference_mode():
            for _ in range(2):
                begun = clock.now()
                runner.call()
                clock.wait(part)
                took = clock.now() - begun
                runner.reset()
        seconds += times * took
    return seconds


def _predictions(output: Any) -> int:
    """Of a batch: positions of a language model, examples of a classifier."""
    first = output[0] if output.get("logits") is None else output["logits"]
    return math.prod(first.shape[:-1])
