"""
Tables and timings of the models that a search asks for.

Long because what can be timed is checked, and said, before it is.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Generic, TypeVar, cast

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from ..discovery.inspected import sizes_of
from ..errors import InvalidPlanError, InvalidRegimeError
from ..files.kept import Kept, digest_of_key
from ..latency.budget import LatencyBudget
from ..latency.build import build_table, random_shapes
from ..latency.cache import cached_table, table_key
from ..latency.effort import Effort
from ..latency.fit import mixed_table
from ..latency.measuring import measure_built
from ..latency.regime import Regime
from ..latency.runner import check_call, check_memory, takes_several
from ..latency.table import LatencyTable, Realised
from ..latency.timing import Timing, unsettled, warn_unsettled
from ..progress import Progress
from ..vanilla.family import Layout, locate, locate_all
from ..vanilla.legality import check_legal, legal_head_shapes
from ..vanilla.loading import checked_device
from ..vanilla.shape import Shape
from .timed_models import realiser

S = TypeVar("S", bound=Hashable)
"""A shape, or those of several towers."""

TIMING = "building and timing shapes"
"""What a search shows its timings as."""


def measure_table(
    model: PreTrainedModel | PeftModel,
    regime: Regime,
    *,
    effort: Effort | None = None,
    hidden_size: int | None = None,
    head_dim: int | None = None,
    tower: str | None = None,
    progress: Progress | None = None,
) -> LatencyTable:
    """
    The latency table of a model under a regime: from the disk cache, or measured with random weights.

    Args:
        model: a dense or gated model; only its class and config are used.
        regime: the conditions.
        effort: what is measured, how long and by which clock, and where tables are kept.
        hidden_size: of all that is timed, for a table of a narrower residual stream; the dense one if left out.
        head_dim: likewise, for a table of narrower heads.
        tower: of several gated towers that whose sizes vary, the rest being dense.
        progress: makes progress bars, as `tqdm.tqdm`; none are shown if left out.

    Raises:
        UnsupportedModelError: if the model has no family row.
        IllegalShapeError: if no model of the hidden size, or the size of heads, exists.
        InvalidPlanError: if several towers are gated and none is named.
        InvalidRegimeError: if the model cannot run that way, or the call does not reach the tower.

    Warns:
        UnsettledTimingWarning: if timers did not settle; such a table is not kept.
        UncachedTableWarning: if it cannot be kept.
    """
    towers = [layout.tower for layout in check_regime(dense_model(model), regime)]
    if tower not in (None, *towers) or (tower is None and len(towers) > 1):
        raise InvalidPlanError(
            f"a latency table is of the sizes of one tower; name one of {towers} as `tower`, got {tower!r}"
        )
    tower = tower or towers[0]
    narrow = Shape(hidden_size=hidden_size, head_dim=head_dim)
    table = table_of(model, regime, effort or Effort(), narrow=narrow, tower=tower, progress=progress)
    warn_unsettled(table.unsettled)
    return table


def table_of(
    model: PreTrainedModel | PeftModel,
    regime: Regime,
    effort: Effort,
    *,
    narrow: Shape | None = None,
    tower: str | None = None,
    multiple: int | None = None,
    progress: Progress | None = None,
    kept: Kept | None = None,
) -> LatencyTable:
    """
    As `measure_table`, with the sizes in a shape, and without a warning: the table says what did not settle. Timings
    are kept as they come, and the `multiple` of FFN sizes is not looked for where it is given.
    """
    base = dense_model(model)
    layout = locate(base, tower)
    widest, base_sizes = sizes_at(base, narrow, tower)
    heads = legal_head_shapes(layout, widest.hidden_size)
    parts = regime.parts()

    def mixed() -> LatencyTable:
        of_part = partial(
            table_of,
            model,
            effort=effort,
            narrow=narrow,
            tower=tower,
            multiple=multiple,
            progress=progress,
            kept=kept,
        )
        each = [(times, of_part(part)) for times, part in parts]
        found = mixed_table(regime, each)
        shapes = random_shapes(widest, heads, found.multiple, effort.whole_shapes, seed=effort.seed)
        missing = [shape for shape in shapes if shape not in {point.shape for point in found.realised}]
        if not missing:
            return found
        # The parts have timed other shapes, because other sizes are fast for them.
        timer: Timer[Shape] = Timer(base, regime, effort, tower=tower, progress=progress, kept=kept)
        timings = timer(missing)
        scale = found.dense_ms / timings[layout.dense].median_ms
        return found.with_realised([Realised(shape, timings[shape].median_ms * scale) for shape in missing])

    measured = partial(
        build_table,
        realiser(layout, regime),
        dense=layout.dense,
        heads=heads,
        base_sizes=base_sizes,
        regime=regime,
        ffn_unit=widest.hidden_size or layout.hidden_size if layout.family.ffn_unit else 1,
        multiple=multiple,
        effort=effort,
        widest=widest,
        progress=progress,
        kept=kept,
    )
    # An external clock sees whole answers as such.
    make = measured if len(parts) == 1 or effort.clock.elsewhere else mixed
    return cached_table(make, table_key(regime, base_sizes, heads, effort), effort)


def sizes_at(
    model: PreTrainedModel, narrow: Shape | None, tower: str | None = None
) -> tuple[Shape, dict[str, int | str]]:
    """
    The largest shape of a hidden size and a size of heads, the dense ones if left out, and what a table of it is for.

    Raises:
        IllegalShapeError: if no model of these sizes exists.
    """
    layout, narrow = locate(model, tower), narrow or Shape()
    widest = layout.complete(replace(layout.narrowed(narrow.hidden_size), head_dim=narrow.head_dim))
    sizes = table_sizes(model, tower)
    cut = {"dense_hidden_size": layout.hidden_size} if widest.hidden_size is not None else {}
    cut |= {"dense_head_dim": layout.head_dim} if widest.head_dim is not None else {}
    if cut:
        check_legal(layout, widest)
        sizes |= widest.to_dict() | cut
    return widest, sizes


def table_sizes(model: PreTrainedModel, tower: str | None = None) -> dict[str, int | str]:
    """What a model's table is for: its sizes; where a call runs all that it is made of, of the rest, too."""
    sizes = locate(model, tower).base_sizes()
    return sizes | {"whole": digest_of_key(sizes_of(model.config.to_dict()))} if takes_several(model) else sizes


class Timer(Generic[S]):
    """
    Builds shapes with random weights and times them side by side, the dense shape among them.

    Args:
        base: the dense model; only its class and config are used.
        regime: the conditions.
        effort: how long, and by which clock.
        tower: whose shapes; those of the one that is gated, or the first, if left out.
        of: instead the dense shape, and what builds a shape, where these are of several towers.
        progress: makes progress bars, as `tqdm.tqdm`; none are shown if left out.
        kept: where timings are kept as they come.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        regime: Regime,
        effort: Effort,
        *,
        tower: str | None = None,
        of: tuple[S, Callable[[S], PreTrainedModel]] | None = None,
        progress: Progress | None = None,
        kept: Kept | None = None,
    ) -> None:
        self.regime, self.effort, self.progress, self._kept = regime, effort, progress, kept
        layout = locate(base, tower)
        alone = cast(tuple[S, Callable[[S], PreTrainedModel]], (layout.dense, realiser(layout, regime)))
        self.dense, self.build = of or alone
        self.timings: list[Timing] = []

    def __call__(self, shapes: Sequence[S]) -> Mapping[S, Timing]:
        """The timings of shapes and of the dense one."""
        found = measure_built(
            self.build,
            shapes,
            self.regime,
            reference=self.dense,
            effort=self.effort,
            label=TIMING,
            progress=self.progress,
            kept=self._kept,
        )
        self.timings += found.values()
        return found

    @property
    def unsettled(self) -> str:
        """What has not settled of all that was timed so far."""
        return unsettled(self.timings, self.effort)


def regime_of(model: PreTrainedModel | PeftModel, budget: LatencyBudget) -> Regime:
    """The budget's regime, with what it leaves out taken from the model."""
    base = dense_model(model)
    generates = base.can_generate() and not takes_several(base)
    return budget.regime(generates=generates, dtype=base.dtype, device=base.device)


def check_regime(model: PreTrainedModel, regime: Regime) -> tuple[Layout, ...]:
    """
    Check that a model can be called under a regime on its device, before any work, and that something that is cut of
    it then runs. Its weights may be anywhere.

    Returns:
        The gated towers that run: where a model is timed on its main input alone, those that see it.

    Raises:
        InvalidRegimeError: if it cannot, or none runs.
        UnsupportedModelError: if the model has no family row.
    """
    checked_device(regime.device)
    check_call(model, regime)
    layouts, main = locate_all(model), model.main_input_name
    seen = {layout.tower: _seen_by(model, layout) for layout in layouts}
    running = tuple(each for each in layouts if seen[each.tower] in ("", main))
    if not running:
        tower, other = next(iter(seen.items()))
        raise InvalidRegimeError(
            f"{type(model).__name__} is timed on its {main} alone, and {tower!r} sees {other}: give the sizes that "
            "are to stay, as a Shape, instead of a budget"
        )
    check_memory(model, regime)
    return running


def _seen_by(model: PreTrainedModel, layout: Layout) -> str:
    """The input that a tower sees; empty if it runs whatever is given."""
    if not layout.tower or takes_several(model):
        return ""
    names = layout.stack.split(".")
    owners = (model.get_submodule(".".join(names[:end])) for end in range(len(names), -1, -1))
    return next(each for each in owners if isinstance(each, PreTrainedModel)).main_input_name


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
