"""
The quality of a shape, judged by masking the dense model.

Long because depth and width are predicted from the same measured losses.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from itertools import accumulate
from typing import Any, cast

import numpy as np
import torch
from peft import PeftModel
from torch import nn

from ..errors import HawAdaError, InvalidPlanError
from ..files.kept import Kept, digest_of_key
from ..gates.attach import masks_put_back
from ..planning.plan import Plan
from ..planning.ranking import rank
from ..processes import Reduce, of_this_rank
from ..progress import Progress, progress_bar
from ..refit.fidelity import KEPT_BYTES
from ..vanilla.batches import Batch
from ..vanilla.family import Layout
from ..vanilla.legality import depth_of
from ..vanilla.mode import evaluating
from ..vanilla.prefix import Prefix
from ..vanilla.shape import BY_NAME, FFN, HEADS, HIDDEN, LAYERS, Shape
from .reference import Reference, first_of, ranked_predictions
from .scores import channels_cut, heads_cut, loss_curve, unit_scores
from .space import SearchSpace

logger = logging.getLogger(__name__)

RESCORED = 8
"""Layers whose loss is measured anew after each drop: those that were cheapest to drop before it."""

ASKED, DEPTH, JUDGED_SHAPES = "asking the dense model", "dropping layers", "judging shapes"
"""What these are shown as."""

WIDTHS = (0.75, 0.5, 0.25)
"""Parts of an axis of width at which the predicted loss is held against a measured one."""

DOUBT = 1.5
"""By how much a predicted loss may be too small, as a factor."""


Skip = Callable[[int], AbstractContextManager[None]]
"""What a pass on a batch, given its number, need not compute."""


class MaskedQuality:
    """
    The quality of a gated model's shapes, by closing gates.

    The loss is the divergence of the masked model from the dense one on calibration batches, without labels, as the
    model's head says (`head_of`). Of several classes, whose logits are too many to keep, outcomes y are drawn once
    from the dense model, and KL(dense, masked) is the mean of `q/p - 1 - log(q/p)` at y, with p the dense and q the
    masked model's probability. Of independent labels it is the exact KL; of one output, regression and hidden states
    the mean squared difference.

    Depth: after each drop the layers that remain are scored anew, on the first batches (`ranked_predictions`), and
    the cheapest goes; the loss of each depth is measured on all. Width: what is cut in each layer is the sum of its
    units' scores, and how much loss that means is measured at a few widths of each axis.

    Args:
        model (`PeftModel`): with gates placed by a family row.
        batches (`Sequence`): calibration batches, keyword arguments of the forward pass.
        importance (`Mapping[str, Tensor]`, *optional*): how much the loss depends on each gate, by the names of
            `collect_gates(model)`; the gates' own values if left out.
        progress (*optional*): makes progress bars, as `tqdm.tqdm`; none are shown if left out.
        reduce (*optional*): sums over ranks; each has batches of its own then.
        kept (`Kept`, *optional*): where losses are kept as they come.
        tower (`str`, *optional*): of several gated towers whose shapes are meant, the others being dense; the first
            if left out.
        references (`Sequence[Reference]`, *optional*): what the dense model says on the batches, where it was asked
            before.

    Attributes:
        also: the plans of other towers that a shape of this one means, because one number of the config is about both;
            none if it is not set.

    Raises:
        HawAdaError: if there are no batches.
        BadDataError: if a batch holds what the model cannot take.
        InvalidPlanError: if not one adapter is active, or its gates were not placed by a family row.

    References:
        Schulman, "Approximating KL Divergence" (2020), the third estimator. Kwon et al., "A Fast Post-Training Pruning
        Framework for Transformers" (2022), for sums of scores as a loss.
    """

    before_recovery = "gates closed, before any recovery"

    def __init__(
        self,
        model: PeftModel,
        batches: Sequence[Batch],
        importance: Mapping[str, torch.Tensor] | None = None,
        progress: Progress | None = None,
        reduce: Reduce = of_this_rank,
        kept: Kept | None = None,
        *,
        tower: str | None = None,
        references: Sequence[Reference] | None = None,
    ) -> None:
        if not batches:
            raise HawAdaError("no calibration batches were given; pass at least one")
        self.model, self._progress, self._reduce = model, progress, reduce
        self._kept = kept or Kept()
        self.tuner = cast(Any, model.base_model)
        self.names = list(self.tuner.active_adapters)
        if len(self.names) != 1:
            raise InvalidPlanError(f"one adapter must be active, got {self.names}; see `model.set_adapter`")
        layouts: Sequence[Layout] = self.tuner.layouts_of(self.names)
        self.layout = next(each for each in layouts if tower in (None, each.tower))
        self.scores = unit_scores(model, self.layout, self.names, importance)
        self.also: Callable[[Shape], Sequence[Plan]] = lambda shape: ()
        self.references: list[Reference] = [] if references is None else list(references)
        if references is None:
            watched = progress_bar(progress, iterable=batches, desc=ASKED, unit="batch", leave=False)
            for index, batch in enumerate(watched):
                self.references.append(Reference.of(model, batch, index))
                if self._is_enough():
                    break
        self.measured: dict[Plan, float] = {}
        ranking = first_of(self.references, ranked_predictions(model))
        left = torch.tensor([len(self.references) - len(ranking)], device=self.references[0].mask.device)
        # Together over ranks: a loss that is known on one of them alone would let the others wait for its sum.
        self._ranking = ranking if int(self._reduce(left)) else self.references
        self._order: list[int] = []
        self._order_loss: list[float] = []
        self._alone: dict[int, float] = {}

    def _is_enough(self) -> bool:
        """Whether no further batch is needed."""
        return False

    @property
    def meaning(self) -> str:
        """What the losses are, for people."""
        return f"{self.references[0].head.unit}, {self.before_recovery}"

    @property
    def free(self) -> tuple[str, ...]:
        """What the gates allow to cut."""
        scores = {HEADS: self.scores.heads, FFN: self.scores.channels, LAYERS: self.scores.layers}
        free = tuple(axis for axis, values in scores.items() if all(value is not None for value in values))
        return free if self.scores.hidden is None else (*free, HIDDEN)

    def plan(self, shape: Shape) -> Plan:
        """What stays at a shape: layers by the order of dropping, units by their scores."""
        return Plan.of_towers([self.part(shape), *self.also(shape)])

    def part(self, shape: Shape) -> Plan:
        """What of this tower stays at a shape."""
        scores = self.scores
        if self._order:
            total = len(scores.layers)
            kept = [
                float(self._order.index(layer)) if layer in self._order else float(total) for layer in range(total)
            ]
            scores = replace(scores, layers=tuple(torch.tensor(value, dtype=torch.float64) for value in kept))
        return rank(self.layout, scores, shape.complete(self.layout.dense))

    def evaluate(self, shape: Shape) -> float:
        """The measured loss of a shape before any recovery, in what `meaning` says."""
        return self.judge(self.plan(shape))

    def judge(self, plan: Plan) -> float:
        """The measured loss of a plan before any recovery, in what `meaning` says."""
        with progress_bar(self._progress, total=1, desc=JUDGED_SHAPES, unit="shape", leave=False) as bar:
            loss = self._judged(plan)
            bar.update(1)
        return loss

    def _judged(self, plan: Plan) -> float:
        return self.loss(plan)

    def loss(self, plan: Plan) -> float:
        """The divergence of the masked model from the dense one on the calibration batches, for a plan."""
        if plan not in self.measured:
            self.measured[plan] = self._mean(plan, self.references, "loss")
        return self.measured[plan]

    def _mean(self, plan: Plan, references: Sequence[Reference], kind: str, skip: Skip | None = None) -> float:
        return self._kept.value(name_of(kind, plan), lambda: self._mean_of(plan, references, skip))

    def _mean_of(self, plan: Plan, references: Sequence[Reference], skip: Skip | None) -> float:
        parts = []
        with self._masked(plan), torch.no_grad():
            for number, reference in enumerate(references):
                with nullcontext() if skip is None else skip(number):
                    parts.append(reference.divergence(self.model))
        device = references[0].mask.device
        total, count = self._reduce(torch.tensor(parts, dtype=torch.float64, device=device).sum(0)).tolist()
        return total / count

    def predict(self, space: SearchSpace) -> np.ndarray:
        """
        The predicted loss over the space: (layers, heads, FFN sizes). Those of its hidden size and of its size of
        heads are measured, and added.
        """
        self._drop_layers(min(space.layers))
        total = self.layout.dense.sizes()["num_hidden_layers"]
        depth_loss = self.depth_losses(min(space.layers))
        heads = np.stack([heads_cut(scores, self.layout.dense, space.heads) for scores in self.scores.heads])
        ffn = np.stack([channels_cut(scores, space.ffn) for scores in self.scores.channels])
        # So few layers meet the budget without any other cut.
        limit = DOUBT * max(depth_loss.values()) or math.inf
        heads_loss = self._measured_curve(heads.sum(0), space.heads, BY_NAME[HEADS].field, limit)
        sizes = [Shape(intermediate_size=size) for size in space.ffn]
        ffn_loss = self._measured_curve(ffn.sum(0), sizes, BY_NAME[FFN].field, limit)
        alone = [Shape(hidden_size=space.hidden_size), Shape(head_dim=space.head_dim)]
        narrower = sum(max(0.0, self.evaluate(shape)) for shape in alone if shape != Shape())
        result = np.empty((len(space.layers), len(space.heads), len(space.ffn)))
        for row, count in enumerate(space.layers):
            dropped = self._order[: total - count]
            kept = [layer for layer in range(total) if layer not in dropped]
            width = heads_loss(heads[kept].sum(0))[:, None] + ffn_loss(ffn[kept].sum(0))[None, :]
            result[row] = narrower + depth_loss[count] + width
        return result

    def depth_losses(self, least: int) -> dict[int, float]:
        """The measured loss of dropping layers and nothing else, by how many remain."""
        self._drop_layers(least)
        prefixes = [self._order[: count + 1] for count in range(len(self._order))]
        return self._by_depth([self.loss(self._without(dropped)) for dropped in prefixes])

    def _by_depth(self, losses: Sequence[float]) -> dict[int, float]:
        """Losses in the order of dropping, by how many layers remain; fewer layers lose no less."""
        total = self.layout.dense.sizes()["num_hidden_layers"]
        highest = np.maximum.accumulate([0.0, *losses]).tolist()
        return {total - dropped: loss for dropped, loss in enumerate(highest)}

    @property
    def depth(self) -> dict[str, Any]:
        """
        What dropping layers was found to cost, with closed gates: `alone`, pairs of a layer and the loss without it;
        the `order` in which they go; and `together`, the loss after each. Empty if none was tried.
        """
        if not self._alone:
            return {}
        alone = [list(pair) for pair in sorted(self._alone.items())]
        return {"alone": alone, "order": list(self._order), "together": list(accumulate(self._order_loss, max))}

    def drop_order(self, layers: int) -> list[int]:
        """The layers to drop so that `layers` remain, the cheapest first."""
        total = self.layout.dense.sizes()["num_hidden_layers"]
        self._drop_layers(layers)
        return self._order[: total - layers]

    def without_layers(self, layers: int) -> Plan:
        """The plan that drops those and nothing else."""
        return self._without(self.drop_order(layers))

    def _drop_layers(self, least: int) -> None:
        """Drop one layer after the other, the cheapest first, scoring those that remain anew each time."""
        total = self.layout.dense.sizes()["num_hidden_layers"]
        last: dict[int, float] = {}
        kept = range(total - len(self._order), least, -1)  # before each drop
        if not kept:
            return
        count = sum(min(RESCORED, each) if index else each for index, each in enumerate(kept))
        held = f"{len(self._ranking)} of {len(self.references)} calibration batches"
        layers = self.model.get_base_model().get_submodule(self.layout.stack)
        prefix = Prefix(cast(nn.ModuleList, layers), self._order, KEPT_BYTES)
        logger.info("dropping %d of %d layers takes %d evaluations of %s", len(kept), total, count, held)
        with progress_bar(self._progress, total=count, desc=DEPTH, unit="evaluation", leave=False) as bar:
            for _ in kept:
                remaining = self._droppable([layer for layer in range(total) if layer not in self._order])
                asked = sorted(remaining, key=lambda layer: last.get(layer, 0.0))[: RESCORED if last else None]
                scores: dict[int, float] = {}
                for layer in sorted(asked, reverse=True):  # the first pass finds what the others start from
                    scores[layer] = self._ranking_loss(layer, prefix)
                    bar.update(1)
                last |= scores
                self._alone = self._alone or scores
                cheapest = min(asked, key=scores.__getitem__)
                prefix.drop(cheapest)
                self._order.append(cheapest)
                self._order_loss.append(scores[cheapest])
        logger.info("layers in the order of dropping: %s", self._order)

    def _ranking_loss(self, layer: int, prefix: Prefix) -> float:
        """The loss of dropping one more layer, on the batches that rank them."""
        plan, skip = self._without([*self._order, layer]), partial(prefix.passing, layer=layer)
        if self._ranking is not self.references:
            return self._mean(plan, self._ranking, "ranking", skip)
        if plan not in self.measured:
            self.measured[plan] = self._mean(plan, self.references, "loss", skip)
        return self.measured[plan]

    def _droppable(self, remaining: Sequence[int]) -> list[int]:
        """Those that may go next: what must stay does, and the last layer before a backbone's stage."""
        needed = set(depth_of(self.layout).pinned)
        for stage in self.layout.stages:
            inside = [layer for layer in remaining if layer in range(*stage)]
            needed |= set(inside) if len(inside) == 1 else set()
        return [layer for layer in remaining if layer not in needed]

    def _without(self, dropped: Sequence[int]) -> Plan:
        return without_layers(self.layout, dropped)

    def _measured_curve(self, cut: np.ndarray, shapes: Sequence[Shape], field: str, limit: float) -> Any:
        """
        From sums of scores to nats, by measured points (`loss_curve`). Widths below the first one that loses more than
        a limit are not measured.
        """
        dense = self.layout.dense.sizes()[field]
        values = np.array([getattr(shape, field) for shape in shapes])
        points: dict[float, float] = {}
        for part in WIDTHS:
            at = int(np.argmin(np.abs(values - part * dense) + 1e-6 * cut / (cut.max() + 1e-30)))
            if values[at] < dense and cut[at] > 0:
                points[float(cut[at])] = max(self.evaluate(shapes[at]), 1e-9)
                if points[float(cut[at])] > limit:
                    break
        return loss_curve(points)

    @contextmanager
    def _masked(self, plan: Plan) -> Iterator[None]:
        """Close what a plan removes, whatever its legality, and put everything back."""
        (name,) = self.names
        with evaluating(self.model), masks_put_back(self.model):
            self.tuner.set_masks(plan, name)
            yield


def without_layers(layout: Layout, dropped: Sequence[int]) -> Plan:
    """The plan that drops those layers of a tower and nothing else."""
    full = Plan.keep_all(layout.dense, layout.tower)
    keep = [layer for layer in full.layers if layer not in dropped]
    return replace(full, layers=tuple(keep), heads=full.heads[: len(keep)], channels=full.channels[: len(keep)])


def name_of(kind: str, plan: Plan) -> str:
    """What a loss of a plan is kept under."""
    return f"{kind} {digest_of_key(plan.to_dict())}"
