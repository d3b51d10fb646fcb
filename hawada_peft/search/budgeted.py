"""From a gated model and a budget to a plan: the table, the search and the timing tied together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from peft import PeftModel

from ..errors import HawAdaError
from ..gates.reading import are_fresh
from ..latency.budget import LatencyBudget
from ..latency.build import TABLE
from ..latency.effort import Effort
from ..latency.settling import warn_unsettled
from ..latency.table import LatencyTable
from ..planning.importance import gate_importance
from ..progress import Progress, in_steps, progress_bar
from ..vanilla.batches import Batch, check_batch
from ..vanilla.family import HIDDEN, locate
from .masked import DEPTH, WIDTHS_OF, MaskedQuality
from .refitted import REFITS, RefittedQuality, obstacle
from .result import SearchResult
from .rounds import search
from .space import narrower_sizes, search_space
from .timed import TIMING, Timer, check_regime, dense_model, regime_of, table_of

IMPORTANCE = "importance"
"""What it is shown as."""


def find_plan(
    model: PeftModel,
    budget: LatencyBudget,
    calibration: Sequence[Batch],
    *,
    table: LatencyTable | None = None,
    hidden_sizes: Sequence[int] | None = None,
    refit: bool | None = None,
    effort: Effort | None = None,
    progress: Progress | None = None,
) -> SearchResult:
    """
    The best plan for a budget, on this machine. Nothing of the model is changed; see `apply_plan`.

    Args:
        model (`PeftModel`): with gates placed by a family row. Units are ranked by the gates' values; by their
            importance on the calibration batches (`gate_importance`) while all gates are as they were made.
        budget (`LatencyBudget`): what the slim model may cost.
        calibration: batches, keyword arguments of the forward pass. Labels count for that importance only.
        table: measured here before; measured or taken from the disk cache if left out.
        hidden_sizes: to search besides the dense one, each by a table of its own; a few even steps down to 3/8 of it
            if left out. Only with gates on `"hidden"`.
        refit: judge shapes by slim models that are refitted on the calibration batches (`RefittedQuality`), as
            `merge_and_unload(calibration=...)` gives them; this foretells best which shape recovers best. `False`
            judges them by closed gates alone, which is quicker and right for a merge without `calibration`. If left
            out: by refitted models, unless trained LoRA or quantized weights forbid it.
        effort: how hard to measure and to look, and by which clock.
        progress: makes progress bars, as `tqdm.tqdm`; none are shown if left out.

    Returns:
        `SearchResult`: the shape, the plan, the measured latency and the whole frontier.

    Raises:
        InfeasibleBudgetError: before any training, if no shape meets the budget.
        IllegalShapeError: if no model of one of the hidden sizes exists.
        IncompatibleTableError: if the table is for another device, regime or model.
        InvalidPlanError: if not one adapter is active, or its gates were not placed by a family row.
        HawAdaError: if there are no batches, or models are to be refitted and cannot be, or there are no two rows to
            do so.
        BadDataError: before anything is measured, if a batch holds what the model cannot take.

    Warns:
        UnsettledTimingWarning: once, if timers did not settle.
        UncachedTableWarning: if a table cannot be kept for later.
    """
    return search_plan(
        model,
        budget,
        calibration,
        table=table,
        hidden_sizes=hidden_sizes,
        refit=refit,
        effort=effort,
        progress=progress,
    )[0]


def search_plan(
    model: PeftModel,
    budget: LatencyBudget,
    calibration: Sequence[Batch],
    *,
    table: LatencyTable | None = None,
    hidden_sizes: Sequence[int] | None = None,
    refit: bool | None = None,
    effort: Effort | None = None,
    progress: Progress | None = None,
) -> tuple[SearchResult, Mapping[str, torch.Tensor] | None]:
    """`find_plan`, and the importance that it took of fresh gates, by the names of `collect_gates`."""
    for name, given, kind in (("budget", budget, LatencyBudget), ("table", table, LatencyTable | None)):
        if not isinstance(given, kind):
            raise HawAdaError(f"{name} must be a {kind}, got a {type(given).__name__}")
    if not isinstance(effort, Effort | None):
        raise HawAdaError(f"effort must be an Effort, got a {type(effort).__name__}")
    effort = effort or Effort()
    base = dense_model(model)
    layout = locate(base)
    regime = regime_of(model, budget)
    check_regime(base, regime)
    if not calibration:
        raise HawAdaError("no calibration batches were given; pass at least one")
    for batch in calibration:
        check_batch(model, batch)  # before anything is measured
    refit = not obstacle(model, calibration) if refit is None else refit
    fresh = are_fresh(model)
    steps = [TABLE] * (table is None) + [IMPORTANCE] * fresh + [DEPTH] + [REFITS] * refit + [WIDTHS_OF, TIMING]
    progress = in_steps(progress, steps)
    tables = [table_of(model, regime, effort, progress=progress) if table is None else table]
    tables[0].check(regime=regime, base_sizes=layout.base_sizes(), device_name=effort.clock.device_name(regime))
    importance = None
    if fresh:
        watched = progress_bar(progress, iterable=calibration, desc=IMPORTANCE, unit="batch", leave=False)
        importance = gate_importance(model, watched)
    quality = (RefittedQuality if refit else MaskedQuality)(model, calibration, importance, progress)
    sizes: Sequence[int] = ()
    if HIDDEN in quality.free:
        found = narrower_sizes(layout, multiple=tables[0].multiple, group_size=quality.scores.hidden_group)
        sizes = found if hidden_sizes is None else hidden_sizes
    for size in sizes:
        tables.append(table_of(model, regime, effort.narrower(), hidden_size=size, progress=progress))
    spaces = [
        search_space(
            layout,
            regime,
            multiple=each.multiple,
            group_size=quality.scores.group_size,
            free=quality.free,
            hidden_size=size,
        )
        for size, each in zip((None, *sizes), tables, strict=True)
    ]
    timer = Timer(base, regime, effort.confirming(), progress=progress)
    narrower = list(zip(spaces[1:], tables[1:], strict=True))
    result = search(spaces[0], tables[0], quality, budget, timer, effort=effort, narrower=narrower)
    warn_unsettled(*(each.unsettled for each in tables), timer.unsettled)
    return result, importance
