"""From a gated model and a budget to a plan: the table, the search and the timing tied together."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache as remember
from functools import partial
from pathlib import Path

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from ..adapters.huggingface.family import HIDDEN, locate
from ..adapters.huggingface.shape import Shape
from ..errors import InvalidRegimeError
from ..latency.budget import LatencyBudget
from ..latency.build import TablePlan, build_table
from ..latency.cache import cached_table, table_key
from ..latency.measure import Clock, Effort, measure_built
from ..latency.regime import Regime
from ..latency.table import LatencyTable
from ..latency.timing import Timing
from ..progress import Progress
from .legality import check_legal, legal_head_shapes
from .quality import Batch, MaskedQuality
from .realise import realiser
from .refitted import RefittedQuality, obstacle
from .rehome import has_twin, twin_skeleton
from .search_export import search
from .search_result import SearchResult
from .search_state import SearchEffort
from .space import narrower_sizes, search_space

CONFIRM = Effort(min_rounds=15, max_rounds=100, max_seconds=30.0, tolerance=0.004)
"""How long the shapes of a search are timed."""

NARROWER = TablePlan(attention=16, ffn=9, realised=6)
"""What is measured for the table of a further hidden size."""


def measure_table(
    model: PreTrainedModel | PeftModel,
    regime: Regime,
    *,
    plan: TablePlan | None = None,
    allow_rehome: bool = False,
    hidden_size: int | None = None,
    cache: str | Path | bool = True,
    clock: Clock = time.perf_counter,
    progress: Progress | None = None,
) -> LatencyTable:
    """
    The latency table of a model under a regime: from the disk cache, or measured with random weights.

    Args:
        model: a dense or gated model; only its class and config are used.
        regime: the conditions.
        plan: what is measured.
        allow_rehome: also time heads that only the family's twin takes.
        hidden_size: of all that is timed, for a table of a narrower residual stream; the dense one if left out.
        cache: a folder; `True` for the user's cache folder, `False` for none.
        clock: seconds.
        progress: makes progress bars, as `tqdm.tqdm`; none are shown if left out.

    Raises:
        UnsupportedModelError: if the model has no family row.
        IllegalShapeError: if no model of the hidden size exists.
        InvalidRegimeError: if the model cannot run that way.
    """
    base, plan = dense_model(model), plan or TablePlan()
    layout = locate(base)
    widest, model_key = layout.narrowed(hidden_size), layout.fingerprint()
    if widest.hidden_size is not None:
        check_legal(base, layout, widest)
        model_key |= widest.to_dict() | {"dense_hidden_size": layout.hidden_size}
    heads, build = builder(base, regime, allow_rehome=allow_rehome, hidden_size=widest.hidden_size)
    make = partial(
        build_table,
        build,
        dense=layout.dense,
        heads=heads,
        model=model_key,
        regime=regime,
        ffn_unit=widest.hidden_size or layout.hidden_size if layout.family.ffn_unit else 1,
        plan=plan,
        widest=widest,
        clock=clock,
        progress=progress,
    )
    if cache is False:
        return make()
    key = table_key(regime, model_key, heads, plan)
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
            out: by refitted models, unless gates on `"hidden"`, trained LoRA or quantized weights forbid it.
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
    """
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
        found = narrower_sizes(base, layout, multiple=table.multiple, group_size=group)
        sizes = found if hidden_sizes is None else hidden_sizes
    tables = [table, *(measure(plan=table_plan or NARROWER, hidden_size=size) for size in sizes)]
    spaces = [
        search_space(
            base,
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


def realise_with(
    base: PreTrainedModel,
    regime: Regime,
    *,
    allow_rehome: bool = False,
    timing: Effort | None = None,
    clock: Clock = time.perf_counter,
    progress: Progress | None = None,
) -> Callable[[Sequence[Shape]], Mapping[Shape, Timing]]:
    """A function that builds shapes with random weights and times them side by side, the dense shape among them."""
    build = builder(base, regime, allow_rehome=allow_rehome)[1]
    dense = locate(base).dense

    def realise(shapes: Sequence[Shape]) -> Mapping[Shape, Timing]:
        return measure_built(
            build,
            shapes,
            regime,
            reference=dense,
            effort=timing or CONFIRM,
            clock=clock,
            label="realising shapes",
            progress=progress,
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
    base: PreTrainedModel, regime: Regime, *, allow_rehome: bool, hidden_size: int | None = None
) -> tuple[list[Shape], Callable[[Shape], PreTrainedModel]]:
    """
    The (query heads, KV groups) that can be built, and what builds them: the model's class, or else its twin's.

    What builds takes shapes of any hidden size; the pairs are those of one.

    Args:
        base: the dense model; only its class and config are used.
        regime: the dtype and device of what is built.
        allow_rehome: whether the twin counts.
        hidden_size: of the pairs that are returned; the dense one if left out.
    """
    layout = locate(base)
    home, own = remember(partial(legal_head_shapes, base, layout)), realiser(base, layout, regime)
    here = home(hidden_size)
    if not allow_rehome or not has_twin(base):
        return here, own
    twin = twin_skeleton(base)
    other, away = legal_head_shapes(twin, locate(twin), hidden_size), realiser(twin, locate(twin), regime)

    def build(shape: Shape) -> PreTrainedModel:
        pair = Shape(shape.num_attention_heads, shape.num_key_value_heads)
        return (own if pair in home(shape.hidden_size) else away)(shape)

    return [*here, *(pair for pair in other if pair not in here)], build
