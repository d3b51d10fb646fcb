"""Plans for a model that is larger than memory, for a budget, without gradients."""

from __future__ import annotations

import os
from collections.abc import Iterable

import torch

from ..basis.basis import Basis, rows_untied
from ..errors import HawAdaError
from ..files.checkpoint import Checkpoint
from ..latency.budget import LatencyBudget
from ..latency.effort import Effort
from ..progress import Progress
from ..refit.activity import activity_of
from ..search.result import SearchResult
from ..search.rounds import search_all_sizes
from ..search.space import narrower_sizes
from ..search.timed import check_regime, table_of
from ..vanilla.batches import Batch
from ..vanilla.family import locate
from .activity_quality import ActivityQuality
from .judged import JudgedQuality
from .walk import open_walk


def plan_checkpoint(
    base: str | os.PathLike[str],
    budget: LatencyBudget,
    calibration: Iterable[Batch],
    *,
    basis: Basis | None = None,
    judge: bool = True,
    device: str | None = None,
    spill: str | os.PathLike[str] | None = None,
    effort: Effort | None = None,
    progress: Progress | None = None,
) -> SearchResult:
    """
    The best plan for a budget of a model that is larger than memory.

    Units are ranked by what they do to the residual stream (`walk_checkpoint`), shapes by the divergence from the
    dense model of what is left, with the rest closed (`JudgedQuality`): several in one walk, layers one by one among
    them. Layers, heads, FFN channels and, with a basis, hidden sizes are cut. Shapes are built with random weights and
    timed as always, so that one model has to fit where it is timed; with an `ExternalClock` none has to fit here.

    Args:
        base: folder or Hub id of the dense model, with safetensors files.
        budget: what the slim model may cost.
        calibration: batches, keyword arguments of its forward pass. Labels are not used, padding does not count.
        basis: of the residual stream (`checkpoint_basis`); hidden sizes stay if left out.
        judge: `False` evaluates no shape: the dense model is walked through once, and what is cut is predicted to cost
            its part of the residual stream.
        device: where layers are computed, and shapes timed unless the budget names another; the CPU if left out.
        spill: a folder on a disk for hidden states, in files without a name; they stay in memory if left out, and on
            an accelerator in its own.
        effort: how hard to measure and to look, and by which clock.
        progress: makes progress bars, as `tqdm.tqdm`; none are shown if left out.

    Raises:
        InfeasibleBudgetError: if no shape meets the budget.
        InvalidRegimeError: if the model cannot be timed under the budget.
        HawAdaError: if there are no batches, or a basis is given and shapes are not to be judged.
        BadDataError, UnsupportedModelError: as `walk_checkpoint`.

    Warns:
        UnsettledTimingWarning: once, if timers did not settle.
    """
    if basis is not None and not judge:
        raise HawAdaError("hidden sizes are searched by the loss that is measured: give a basis, or judge=False")
    effort, skeleton = effort or Effort(), Checkpoint(base).skeleton
    layout, where = locate(skeleton), torch.device(device or "cpu")
    regime = budget.regime(generates=skeleton.can_generate(), dtype=skeleton.dtype, device=where)
    check_regime(skeleton, regime)
    with open_walk(base, calibration, device=device, spill=spill) as walk:
        activity = ActivityQuality(layout, activity_of(walk.start(), walk.batches), basis)
        table = table_of(skeleton, regime, effort, progress=progress)
        sizes = [] if basis is None else narrower_sizes(layout, multiple=table.multiple)
        untied = rows_untied(skeleton, layout, walk.checkpoint.whole) if sizes else 0
        return search_all_sizes(
            skeleton,
            budget,
            JudgedQuality(walk, activity, sizes, progress) if judge else activity,
            table,
            sizes,
            choose=True,
            untied=untied,
            effort=effort,
            progress=progress,
        )
