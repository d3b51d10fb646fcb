"""Tables and timings of the models that a search asks for."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache as remember
from functools import partial
from pathlib import Path

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from ..errors import InvalidRegimeError
from ..latency.budget import LatencyBudget
from ..latency.build import TablePlan, build_table
from ..latency.cache import cached_table, table_key
from ..latency.clock import Clock, Effort, measure_built
from ..latency.regime import Regime
from ..latency.table import LatencyTable
from ..latency.timing import Timing
from ..progress import Progress
from ..vanilla.family import locate
from ..vanilla.legality import check_legal, legal_head_shapes
from ..vanilla.rehoming import has_twin, twin_skeleton
from ..vanilla.shape import Shape
from .timed_models import realiser

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
        check_legal(layout, widest)
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
    home, own = remember(partial(legal_head_shapes, layout)), realiser(layout, regime)
    here = home(hidden_size)
    if not allow_rehome or not has_twin(layout):
        return here, own
    twin = locate(twin_skeleton(layout))
    other, away = legal_head_shapes(twin, hidden_size), realiser(twin, regime)

    def build(shape: Shape) -> PreTrainedModel:
        pair = Shape(shape.num_attention_heads, shape.num_key_value_heads)
        return (own if pair in home(shape.hidden_size) else away)(shape)

    return [*here, *(pair for pair in other if pair not in here)], build
