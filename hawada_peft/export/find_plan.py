"""From a gated model and a budget to a plan: the table, the search and the timing tied together."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from ..adapters.huggingface.family import locate
from ..adapters.huggingface.shape import Shape
from ..errors import InvalidRegimeError
from ..latency.budget import LatencyBudget
from ..latency.build import TablePlan, build_table
from ..latency.cache import cached_table, table_key
from ..latency.measure import Clock, Effort, measure_built
from ..latency.regime import Regime
from ..latency.table import LatencyTable
from ..latency.timing import Timing
from .legality import legal_head_shapes
from .quality import Batch, MaskedQuality
from .realise import realiser
from .rehome import has_twin, twin_skeleton
from .search_export import search
from .search_state import SearchEffort, SearchResult
from .space import search_space

CONFIRM = Effort(min_rounds=15, max_rounds=100, max_seconds=30.0, tolerance=0.004)
"""How long the shapes of a search are timed."""


def measure_table(
    model: PreTrainedModel | PeftModel,
    regime: Regime,
    *,
    plan: TablePlan | None = None,
    allow_rehome: bool = False,
    cache: str | Path | bool = True,
    clock: Clock = time.perf_counter,
) -> LatencyTable:
    """
    The latency table of a model under a regime: from the disk cache, or measured with random weights.

    Args:
        model: a dense or gated model; only its class and config are used.
        regime: the conditions.
        plan: what is measured.
        allow_rehome: also time heads that only the family's twin takes.
        cache: a folder; `True` for the user's cache folder, `False` for none.
        clock: seconds.

    Raises:
        UnsupportedModelError: if the model has no family row.
        InvalidRegimeError: if the model cannot run that way.
    """
    base, plan = dense_model(model), plan or TablePlan()
    layout = locate(base)
    heads, build = builder(base, regime, allow_rehome=allow_rehome)
    make = partial(
        build_table,
        build,
        dense=layout.dense,
        heads=heads,
        model=layout.fingerprint(),
        regime=regime,
        ffn_unit=layout.hidden_size if layout.family.ffn_unit else 1,
        plan=plan,
        clock=clock,
    )
    if cache is False:
        return make()
    key = table_key(regime, layout.fingerprint(), heads, plan)
    return cached_table(make, key, None if cache is True else cache)


def find_plan(
    model: PeftModel,
    budget: LatencyBudget,
    calibration: Sequence[Batch],
    *,
    importance: Mapping[str, torch.Tensor] | None = None,
    table: LatencyTable | None = None,
    table_plan: TablePlan | None = None,
    allow_rehome: bool = False,
    effort: SearchEffort | None = None,
    timing: Effort | None = None,
    cache: str | Path | bool = True,
) -> SearchResult:
    """
    The best plan for a budget, on this machine. Nothing of the model is changed; see `apply_plan`.

    Args:
        model (`PeftModel`): with gates placed by a family row.
        budget (`LatencyBudget`): what the slim model may cost.
        calibration: batches, keyword arguments of the forward pass; labels are not used.
        importance: how much the loss depends on each gate (`gate_importance`); the gates' values if left out.
        table: measured here before; measured or taken from the disk cache if left out.
        table_plan: what is measured for it then.
        allow_rehome: also offer shapes that only the family's twin takes (a Llama as a Mistral): `result.best.rehomed`
            says so, and such a plan is exported by `slim(rehome(dense), plan)`.
        effort: how hard to look.
        timing: how long candidates are timed.
        cache: of the table, as in `measure_table`.

    Returns:
        `SearchResult`: the shape, the plan, the measured latency and the whole frontier.

    Raises:
        InfeasibleBudgetError: before any training, if no shape meets the budget.
        IncompatibleTableError: if the table is for another device, regime or model.
    """
    base = dense_model(model)
    layout = locate(base)
    regime = regime_of(model, budget)
    if table is None:
        table = measure_table(model, regime, plan=table_plan, allow_rehome=allow_rehome, cache=cache)
    table.check(regime=regime, model=layout.fingerprint())
    quality = MaskedQuality(model, calibration, importance)
    space = search_space(
        base,
        layout,
        regime,
        multiple=table.multiple,
        group_size=quality.scores.group_size,
        free=quality.free,
        allow_rehome=allow_rehome,
    )
    realise = realise_with(base, regime, allow_rehome=allow_rehome, timing=timing)
    return search(space, table, quality, budget, realise, effort=effort)


def realise_with(
    base: PreTrainedModel,
    regime: Regime,
    *,
    allow_rehome: bool = False,
    timing: Effort | None = None,
    clock: Clock = time.perf_counter,
) -> Callable[[Sequence[Shape]], Mapping[Shape, Timing]]:
    """A function that builds shapes with random weights and times them side by side, the dense shape among them."""
    build = builder(base, regime, allow_rehome=allow_rehome)[1]
    dense = locate(base).dense

    def realise(shapes: Sequence[Shape]) -> Mapping[Shape, Timing]:
        return measure_built(
            build, shapes, regime, reference=dense, effort=timing or CONFIRM, clock=clock, label="realising shapes"
        )

    return realise


def regime_of(model: PreTrainedModel | PeftModel, budget: LatencyBudget) -> Regime:
    """The budget's regime, with what it leaves out taken from the model."""
    base = dense_model(model)
    return budget.regime(generates=base.can_generate(), dtype=base.dtype, device=base.device)


def dense_model(model: nn.Module) -> PreTrainedModel:
    """
    The transformers model inside a PEFT model, or the model itself.

    Raises:
        InvalidRegimeError: if there is none.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    if not isinstance(base, PreTrainedModel):
        raise InvalidRegimeError(f"only transformers models can be planned by latency, got {type(base).__name__}")
    return base


def builder(
    base: PreTrainedModel, regime: Regime, *, allow_rehome: bool
) -> tuple[list[Shape], Callable[[Shape], PreTrainedModel]]:
    """
    The (query heads, KV groups) that can be built, and what builds them: the model's class, or else its twin's.

    Args:
        base: the dense model; only its class and config are used.
        regime: the dtype and device of what is built.
        allow_rehome: whether the twin counts.
    """
    layout = locate(base)
    home, own = legal_head_shapes(base, layout), realiser(base, layout, regime)
    if not allow_rehome or not has_twin(base):
        return home, own
    twin = twin_skeleton(base)
    other, away = legal_head_shapes(twin, locate(twin)), realiser(twin, locate(twin), regime)

    def build(shape: Shape) -> PreTrainedModel:
        pair = replace(shape, intermediate_size=None, num_hidden_layers=None)
        return (own if pair in home else away)(shape)

    return [*home, *(pair for pair in other if pair not in home)], build
