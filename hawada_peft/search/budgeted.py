"""From a gated model and a budget to a plan: the table, the search and the timing tied together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from peft import PeftModel

from ..latency.budget import LatencyBudget
from ..latency.build import TablePlan
from ..latency.clock import Effort
from ..latency.table import LatencyTable
from ..progress import Progress
from ..vanilla.batches import Batch, check_batch
from ..vanilla.family import HIDDEN, locate
from .effort import SearchEffort
from .masked import MaskedQuality
from .refitted import RefittedQuality, obstacle
from .result import SearchResult
from .rounds import search
from .space import narrower_sizes, search_space
from .timed import NARROWER, dense_model, measure_table, realise_with, regime_of


def find_plan(
    model: PeftModel,
    budget: LatencyBudget,
    calibration: Sequence[Batch],
    *,
    importance: Mapping[str, torch.Tensor] | None = None,
    table: LatencyTable | None = None,
    table_plan: TablePlan | None = None,
    allow_rehome: bool = False,
    hidden_sizes: Sequence[int] | None = None,
    refit: bool | None = None,
    effort: SearchEffort | None = None,
    timing: Effort | None = None,
    cache: str | Path | bool = True,
    progress: Progress | None = None,
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
        hidden_sizes: to search besides the dense one, each by a table of its own; a few even steps down to half of it
            if left out. Only with gates on `"hidden"`.
        refit: judge shapes by slim models that are refitted on the calibration batches (`RefittedQuality`), as
            `merge_and_unload(calibration=...)` gives them; this foretells best which shape recovers best. `False`
            judges them by closed gates alone, which is quicker and right for a merge without `calibration`. If left
            out: by refitted models, unless trained LoRA or quantized weights forbid it.
        effort: how hard to look.
        timing: how long candidates are timed.
        cache: of the table, as in `measure_table`.
        progress: makes progress bars, as `tqdm.tqdm`; none are shown if left out.

    Returns:
        `SearchResult`: the shape, the plan, the measured latency and the whole frontier.

    Raises:
        InfeasibleBudgetError: before any training, if no shape meets the budget.
        IllegalShapeError: if no model of one of the hidden sizes exists.
        IncompatibleTableError: if the table is for another device, regime or model.
        HawAdaError: if models are to be refitted and cannot be, or there are no two rows to do so.
        BadDataError: before anything is measured, if a batch holds what the model cannot take.
    """
    for batch in calibration:
        check_batch(model, batch)  # before anything is measured
    base = dense_model(model)
    layout = locate(base)
    regime = regime_of(model, budget)
    measure = partial(measure_table, model, regime, allow_rehome=allow_rehome, cache=cache, progress=progress)
    if table is None:
        table = measure(plan=table_plan)
    table.check(regime=regime, model=layout.fingerprint())
    refit = not obstacle(model, calibration) if refit is None else refit
    quality = (RefittedQuality if refit else MaskedQuality)(model, calibration, importance, progress)
    sizes: Sequence[int] = ()
    if HIDDEN in quality.free:
        group = quality.scores.hidden_group
        found = narrower_sizes(layout, multiple=table.multiple, group_size=group)
        sizes = found if hidden_sizes is None else hidden_sizes
    tables = [table, *(measure(plan=table_plan or NARROWER, hidden_size=size) for size in sizes)]
    spaces = [
        search_space(
            layout,
            regime,
            multiple=each.multiple,
            group_size=quality.scores.group_size,
            free=quality.free,
            allow_rehome=allow_rehome,
            hidden_size=size,
        )
        for size, each in zip((None, *sizes), tables, strict=True)
    ]
    realise = realise_with(base, regime, allow_rehome=allow_rehome, timing=timing, progress=progress)
    narrower = list(zip(spaces[1:], tables[1:], strict=True))
    return search(spaces[0], table, quality, budget, realise, effort=effort, narrower=narrower)
