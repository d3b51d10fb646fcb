"""
From a gated model and a budget to a plan: the table, the search and the timing tied together.

Long because what a search takes is documented and checked in full.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from typing import Any

import torch
import transformers
from peft import PeftModel

from .. import __version__
from ..basis.basis import rows_untied
from ..basis.heads.moments import MOMENTS as OF_HEADS
from ..basis.moments import MOMENTS
from ..basis.refine import REFINING
from ..basis.scales import FACTORS
from ..errors import HawAdaError, InvalidPlanError
from ..files.kept import Kept, digest_of_tensors
from ..gates.reading import are_fresh
from ..latency.budget import LatencyBudget
from ..latency.build import TABLE
from ..latency.effort import Effort
from ..latency.table import LatencyTable
from ..planning.importance import gate_importance
from ..planning.towers import with_all
from ..progress import Progress, in_steps, progress_bar
from ..vanilla.batches import Batch, check_batch
from ..vanilla.family import locate, locate_all
from ..vanilla.shape import HIDDEN
from .directions import Found, may_add_directions, may_narrow_heads, with_directions
from .masked import ASKED, DEPTH, JUDGED_SHAPES, MaskedQuality
from .refitted import REFITS, RefittedQuality, obstacle
from .result import SearchResult
from .rounds import search_all_sizes
from .space import narrower_heads, narrower_sizes
from .timed import TIMING, check_regime, dense_model, regime_of, table_of, table_sizes
from .together import search_together

logger = logging.getLogger(__name__)

IMPORTANCE = "importance"
"""What it is shown as."""

Tables = LatencyTable | Mapping[str, LatencyTable]
"""A latency table; of several towers one for each."""

NO_EFFECT = ("clock", "cache", "fresh")
"""Of the effort, what the results of a search do not depend on."""


def find_plan(
    model: PeftModel,
    budget: LatencyBudget,
    calibration: Sequence[Batch],
    *,
    table: Tables | None = None,
    hidden_sizes: Sequence[int] | None = None,
    rotate: bool | None = None,
    refit: bool | None = None,
    effort: Effort | None = None,
    progress: Progress | None = None,
    work: str | os.PathLike[str] | None = None,
) -> SearchResult:
    """
    The best plan for a budget, on this machine. What the model computes is not changed; see `apply_plan`.

    Hidden sizes are searched as well, cut along directions of the residual stream that the calibration batches name.
    If the plan cuts it and the adapter had no gates there, it gets them, with the basis, so that the plan can be
    applied, saved and exported as any other; otherwise the adapter stays as it is. This costs a pass with gradients
    over the calibration batches and, the first time on a machine, a second, smaller latency table (`NarrowTables`);
    `rotate=False` spares it.

    So are sizes of heads where attention knows no rotary positions (`narrow_heads`): all heads stay, each with the
    features that matter most on the calibration batches. If the plan narrows them, the adapter gets the bases inside
    of heads. This costs a pass over the calibration batches and a further, smaller table; `rotate=False` spares that,
    too.

    Of several gated towers all that run in the calls that are timed are searched together (`search_together`), each
    with a latency table of its own; one that does not run stays as it is, as nothing is saved by cutting it.

    Args:
        model (`PeftModel`): with gates placed by a family row. Units are ranked by the gates' values; by their
            importance on the calibration batches (`gate_importance`) while all gates are as they were made.
        budget (`LatencyBudget`): what the slim model may cost.
        calibration: batches, keyword arguments of the forward pass. Labels count for that importance only.
        table: measured here before; measured or taken from the disk cache if left out. Of several towers one for each
            by its name, as `measure_table(..., tower=)` gives them; what is left out is measured.
        hidden_sizes: to search besides the dense one; if left out, of a few even steps down to 3/8 of it those that
            that may win (`worthwhile_sizes`).
        rotate: `False` searches no hidden sizes unless the adapter has gates on `"hidden"`, and no sizes of heads
            unless it has bases inside of them; `True` says by an error what forbids a basis of the stream. If left
            out, they are searched where that is exact for the family and the calibration batches hold positions
            enough for a basis.
        refit: judge shapes by slim models that are refitted on the calibration batches (`RefittedQuality`), as
            `merge_and_unload(calibration=...)` gives them; this foretells best which shape recovers best. `False`
            judges them by closed gates alone, which is quicker and right for a merge without `calibration`. If left
            out: by refitted models, unless trained LoRA or quantized weights forbid it.
        effort: how hard to measure and to look, and by which clock.
        progress: makes progress bars, as `tqdm.tqdm`; none are shown if left out.
        work: a folder in which what is found is kept as it comes: losses, timings, importance, basis. The same search
            on the same model and data, interrupted at whatever moment, goes on from there. Nothing is removed
            (`clear_kept` does).

    Returns:
        `SearchResult`: the shape, the plan, the measured latency and the whole frontier.

    Raises:
        InfeasibleBudgetError: before any training, if no shape meets the budget.
        IllegalShapeError: if no model of one of the hidden sizes exists.
        IncompatibleTableError: if the table is for another device, regime or model.
        InvalidPlanError: if not one adapter is active, its gates were not placed by a family row, or they are on
            several towers, and an argument is about one.
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
        rotate=rotate,
        refit=refit,
        effort=effort,
        progress=progress,
        work=work,
    )[0]


def search_plan(
    model: PeftModel,
    budget: LatencyBudget,
    calibration: Sequence[Batch],
    *,
    table: Tables | None = None,
    hidden_sizes: Sequence[int] | None = None,
    rotate: bool | None = None,
    refit: bool | None = None,
    effort: Effort | None = None,
    progress: Progress | None = None,
    work: str | os.PathLike[str] | None = None,
) -> Found:
    """`find_plan`, and the importance that it took of fresh gates, by the names of `collect_gates`."""
    for name, given, kind in (("budget", budget, LatencyBudget), ("table", table, LatencyTable | Mapping | None)):
        if not isinstance(given, kind):
            raise HawAdaError(f"{name} must be a {kind}, got a {type(given).__name__}")
    if not isinstance(effort, Effort | None):
        raise HawAdaError(f"effort must be an Effort, got a {type(effort).__name__}")
    effort = effort or Effort()
    base = dense_model(model)
    regime = regime_of(model, budget)
    towers = [layout.tower for layout in check_regime(base, regime)]
    several = len(locate_all(base)) > 1
    _check_several(towers, several, hidden_sizes=hidden_sizes, rotate=rotate)
    tables = _tables_of(towers, table)
    for tower, each in tables.items():
        sizes = table_sizes(base, tower)
        each.check(regime=regime, base_sizes=sizes, device_name=effort.clock.device_name(regime))
    if not calibration:
        raise HawAdaError("no calibration batches were given; pass at least one")
    for batch in calibration:
        check_batch(model, batch)  # before anything is measured
    refit = not obstacle(model, calibration, towers) if refit is None else refit
    kept = Kept()
    if work is not None:
        asked = {"table": table, "hidden_sizes": hidden_sizes, "rotate": rotate, "refit": refit}
        kept = Kept(work, _all_that_counts(model, budget, calibration, effort) | asked)
    turned = [MOMENTS, REFINING, FACTORS] if not several and may_add_directions(model, rotate) else []
    turned += [OF_HEADS] if not several and may_narrow_heads(model, rotate) else []
    steps = [TABLE] * (len(tables) < len(towers)) + turned + [IMPORTANCE] * are_fresh(model)
    progress = in_steps(progress, [*steps, ASKED, DEPTH, *[REFITS] * refit, JUDGED_SHAPES, TIMING])
    if several:
        return _search_towers(model, budget, calibration, towers, tables, refit, effort, progress, kept)
    alone = tables.get(towers[0]) or table_of(model, regime, effort, progress=progress, kept=kept)

    def search_all() -> Found:
        return _search(model, budget, calibration, alone, hidden_sizes, refit, effort, progress, kept)

    return with_directions(model, calibration, rotate, search_all, progress=progress, kept=kept)


def _search(
    model: PeftModel,
    budget: LatencyBudget,
    calibration: Sequence[Batch],
    table: LatencyTable,
    hidden_sizes: Sequence[int] | None,
    refit: bool,
    effort: Effort,
    progress: Progress | None,
    kept: Kept,
) -> Found:
    base = dense_model(model)
    layout = locate(base)
    importance = _importance_of(model, calibration, progress, kept)
    quality = (RefittedQuality if refit else MaskedQuality)(model, calibration, importance, progress, kept=kept)
    sizes: Sequence[int] = ()
    if HIDDEN in quality.free:
        sizes = narrower_sizes(layout, multiple=table.multiple, group_size=quality.scores.hidden_group)
        sizes = sizes if hidden_sizes is None else hidden_sizes
    heads = narrower_heads(layout) if quality.scores.in_heads else ()
    untied = rows_untied(base, layout) if quality.scores.rotated and sizes else 0
    result = search_all_sizes(
        base,
        budget,
        quality,
        table,
        sizes,
        choose=hidden_sizes is None,
        heads=heads,
        untied=untied,
        effort=effort,
        progress=progress,
        kept=kept,
    )
    return replace(result, depth=quality.depth), importance


def _check_several(towers: Sequence[str], several: bool, **given: Any) -> None:
    """Refuse what is about the residual stream of one tower where several are gated."""
    about = sorted(name for name, value in given.items() if value)
    if several and about:
        raise InvalidPlanError(
            f"gates are on several towers, and {', '.join(about)} is about the residual stream of one: leave it out, "
            f"or gate one, as HawAdaConfig(towers=({towers[0]!r},))"
        )


def _tables_of(towers: Sequence[str], table: Tables | None) -> dict[str, LatencyTable]:
    """
    The tables that are given, by the tower.

    Raises:
        InvalidPlanError: if one is of no tower that is searched, or one is given for several.
    """
    if table is None:
        return {}
    if isinstance(table, LatencyTable):
        if len(towers) == 1:
            return {towers[0]: table}
        raise InvalidPlanError(
            f"a latency table is of the sizes of one tower, and {list(towers)} are searched: give one for each by its "
            f"name, as table={{{towers[0]!r}: measure_table(model, regime, tower={towers[0]!r}), ...}}"
        )
    wrong = [name for name, each in table.items() if name not in towers or not isinstance(each, LatencyTable)]
    if wrong:
        raise InvalidPlanError(f"table must hold latency tables of towers that are searched, {list(towers)}: {wrong}")
    return dict(table)


def _search_towers(
    model: PeftModel,
    budget: LatencyBudget,
    calibration: Sequence[Batch],
    towers: Sequence[str],
    tables: Mapping[str, LatencyTable],
    refit: bool,
    effort: Effort,
    progress: Progress | None,
    kept: Kept,
) -> Found:
    """The search over those of several gated towers that a call runs; the others stay."""
    base, regime = dense_model(model), regime_of(model, budget)
    layouts = locate_all(base)
    running = [layout for layout in layouts if layout.tower in towers]
    importance = _importance_of(model, calibration, progress, kept)

    def quality_of(tower: str, first: MaskedQuality | None) -> MaskedQuality:
        references = None if first is None else first.references
        quality = RefittedQuality if refit else MaskedQuality
        return quality(model, calibration, importance, progress, kept=kept, tower=tower, references=references)

    result = search_together(
        base, running, regime, budget, quality_of, tables=tables, effort=effort, progress=progress, kept=kept
    )
    idle = [layout for layout in layouts if layout.tower not in towers]
    steps = {**result.steps, **{layout.tower: "does not run in the calls that are timed: stays" for layout in idle}}
    return replace(result, plan=with_all(layouts, result.plan), steps=steps), importance


def _importance_of(
    model: PeftModel, calibration: Sequence[Batch], progress: Progress | None, kept: Kept
) -> dict[str, torch.Tensor] | None:
    """How much the loss depends on each gate, where the gates themselves do not say it yet."""
    if not are_fresh(model):
        return None
    watched = progress_bar(progress, iterable=calibration, desc=IMPORTANCE, unit="batch", leave=False)
    return kept.tensors(IMPORTANCE, lambda: gate_importance(model, watched))


def _all_that_counts(
    model: PeftModel, budget: LatencyBudget, calibration: Sequence[Batch], effort: Effort
) -> dict[str, Any]:
    """What a search's results depend on, for `Kept`."""
    regime = regime_of(model, budget)
    effects = {each.name: getattr(effort, each.name) for each in fields(effort) if each.name not in NO_EFFECT}
    return {
        "versions": [__version__, torch.__version__, transformers.__version__],
        "device": effort.clock.device_name(regime),
        "threads": torch.get_num_threads(),
        "regime": regime.to_dict(),
        "budget": asdict(budget),
        "effort": effects,
        "config": dense_model(model).config.to_dict(),
        "weights": digest_of_tensors(model.state_dict()),
        "calibration": [digest_of_tensors(batch) for batch in calibration],
    }
