"""The end of a recipe: both models judged and timed, and the slim one saved."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, cast

import torch
from accelerate import PartialState  # type: ignore[import-untyped]
from torch import nn
from torch.utils.data import Dataset
from transformers import PreTrainedModel

from ..evaluation.measures import qualities
from ..latency.budget import LatencyBudget
from ..latency.measuring import measure_many
from ..latency.regime import Regime
from ..latency.timing import Timing
from ..planning.cut import BESIDE
from ..planning.plan import Plan
from ..search.timed import regime_of
from ..shipping.facts import ExportFacts
from ..shipping.save import save_slim
from ..vanilla.family import locate_all
from ..vanilla.loading import processor_of
from .examples import Example, batches_from
from .facts import Facts
from .recipe import Recipe
from .record import Record
from .result import RecipeResult

HELD_OUT_BATCH = 8
"""Examples per batch when the held-out ones are evaluated."""


def finish(
    recipe: Recipe,
    record: Record,
    models: tuple[PreTrainedModel, PreTrainedModel],
    plan: Plan,
    held_out: Dataset[Example],
    facts: Facts,
) -> RecipeResult:
    """Evaluate, time and save."""
    dense, slim = (model.eval() for model in models)
    if recipe.save_dtype is not None:
        nn.Module.to(slim, dtype=getattr(torch, recipe.save_dtype))
    state = PartialState()
    result = None
    if state.is_main_process:
        nn.Module.to(slim, dense.device)
        count = recipe.source().held_out
        batches = batches_from(held_out, count, HELD_OUT_BATCH)
        quality = qualities(dense, slim, batches, f"{count} held-out examples")
        timings = _time(recipe, dense, slim)
        refit = None if facts.reconstruction is None else asdict(facts.reconstruction)
        save_slim(
            slim,
            record.slim,
            processor=processor_of(recipe.model),
            card=ExportFacts(
                base=recipe.model,
                plan=plan,
                latency=timings,
                search=record.search(),
                race=facts.race,
                quality=quality,
                reconstruction=refit,
                losses=facts.losses,
                calibration=facts.calibration,
            ),
        )
        result = RecipeResult(
            folder=str(record.slim),
            dense=_sizes(dense),
            slim=_sizes(slim),
            dense_parameters=dense.num_parameters(),
            slim_parameters=slim.num_parameters(),
            losses=facts.losses,
            reconstruction=refit,
            quality=[asdict(change) for change in quality],
            latency=None if timings is None else _latency(timings),
        )
        record.finish(result.to_dict())
    state.wait_for_everyone()
    return result or RecipeResult.from_dict(cast(dict[str, Any], record.result()))


def _sizes(model: PreTrainedModel) -> dict[str, Any]:
    """Of the first tower that is gated or cut, and of further ones beside it."""
    first, *others = locate_all(model)
    beside = {layout.tower: layout.full.to_dict() for layout in others}
    return first.full.to_dict() | ({BESIDE: beside} if beside else {})


def _time(recipe: Recipe, dense: PreTrainedModel, slim: PreTrainedModel) -> dict[str, Timing] | None:
    """Both models side by side, under the budget's regime. The dense one is used up."""
    if not recipe.times():
        return None
    regime: Regime = regime_of(dense, LatencyBudget(**cast(dict[str, Any], recipe.budget)))
    small: nn.Module = copy.deepcopy(slim)  # what is saved keeps its dtype
    timed = {
        name: cast(PreTrainedModel, nn.Module.to(model, regime.device, regime.torch_dtype))
        for name, model in (("dense", dense), ("slim", small))
    }
    return measure_many(timed, regime, effort=recipe.effort())


def _latency(timings: Mapping[str, Timing]) -> dict[str, Any]:
    dense, slim = timings["dense"], timings["slim"]
    return {
        "dense_ms": dense.median_ms,
        "slim_ms": slim.median_ms,
        "speedup": dense.median_ms / slim.median_ms,
        "regime": str(slim.regime),
        "device": slim.device_name,
    }
