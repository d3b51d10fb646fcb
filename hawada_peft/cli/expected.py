"""What a search will cost, said before it is spent: the first batch is timed."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Any

import torch

from ..search.masked import RANKED, RESCORED
from ..vanilla.batches import on_device
from ..vanilla.family import locate
from .tables import spoken

if TYPE_CHECKING:
    from peft import PeftModel

    from ..latency.budget import LatencyBudget
    from .shared import Batches

SPARE = 1.3
"""Layers that are dropped for a speedup, by those that a model of equal layers and nothing else would have to drop."""


def expected_of(model: PeftModel, batches: Batches, budget: LatencyBudget) -> str:
    """
    About how long the calibration data will be computed on, and what is held in memory, in a line.

    Args:
        model: with gates.
        batches: of the calibration.
        budget: how far layers may be dropped.
    """
    base: Any = model.get_base_model()
    layers = locate(base).dense.sizes()["num_hidden_layers"]
    part = 1 - 1 / budget.speedup if budget.speedup else 1 - (budget.fraction or 0.5)
    dropped = min(layers - 1, math.ceil(SPARE * part * layers))
    passes = layers + RESCORED * dropped
    batch = on_device(batches[0], base.device)
    with torch.inference_mode():
        model(**batch)
        begun = time.perf_counter()
        output = model(**batch)
    once = time.perf_counter() - begun
    ranking = min(len(batches), math.ceil(RANKED / max(1, _predictions(output))))  # as `first_of` takes them
    weights = sum(each.numel() * each.element_size() for each in base.parameters())
    examples = sum(len(next(iter(each.values()))) for each in batches)
    return (
        f"{examples} examples, {once * len(batches):.1f} s for all of them; about {passes} times {ranking} of "
        f"{len(batches)} batches to rank the layers: {spoken(once * ranking * passes)} at most, beside judging a few "
        "dozen shapes and measuring the latency tables (once per model and machine). "
        f"Weights: {weights / 2**30:.2f} GiB, at times twice."
    )


def _predictions(output: Any) -> int:
    """Of a batch: positions of a language model, examples of a classifier."""
    first = output[0] if output.get("logits") is None else output["logits"]
    return math.prod(first.shape[:-1])
