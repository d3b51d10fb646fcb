"""The quality of shapes of a model larger than memory, by the loss of models with parts closed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import numpy as np
import torch

from ..planning.plan import Plan
from ..planning.ranking import rank
from ..progress import Progress
from ..search.masked import WIDTHS
from ..search.reference import RANKED
from ..search.scores import channels_cut, heads_cut, loss_curve
from ..search.space import SearchSpace
from ..vanilla.legality import check_legal, depth_of
from ..vanilla.shape import FFN, HEADS, HIDDEN, Shape
from .activity_quality import ActivityQuality
from .closed import closed_losses
from .walk import Walk

RUNS = 3
"""Runs of neighbouring layers that are tried at each depth."""

LEAST = 1e-9
"""A measured loss is no less, so that it has a logarithm."""


class JudgedQuality:
    """
    The quality of shapes by the divergence from the dense model of what their plans leave, parts closed and nothing
    refitted. Several plans are judged in one walk (`closed_losses`), on the first batches (`RANKED` positions).

    Depth: each layer is judged alone. Then, for each number of layers, the best of a few choices: those that lose
    least alone go, or those of least influence, or one of the `RUNS` runs of neighbours that lose least alone, added
    up. Width: the energy that is cut; how much loss that means is measured at a few widths of each axis. Hidden size:
    measured.

    Args:
        walk: through the dense model.
        quality: of the same model, by its activity; with a basis, if hidden sizes are judged.
        hidden_sizes: those.
        progress: makes progress bars.
    """

    def __init__(
        self,
        walk: Walk,
        quality: ActivityQuality,
        hidden_sizes: Sequence[int] = (),
        progress: Progress | None = None,
    ) -> None:
        self.layout, self._basis, self._progress = quality.layout, quality.basis, progress
        self._walk, self._stream = walk.up_to(RANKED)
        self.losses: dict[Plan, float] = {}
        self._metric = ""
        self._influence = quality.scores.layers
        self.scores = quality.scores
        self.free = (*quality.free, HIDDEN) if quality.scores.rotated else quality.free
        self._depths: dict[int, Plan] = {}
        self._curves: dict[str, Callable[[np.ndarray], np.ndarray]] = {}
        layers = self._droppable()
        alone = [self._without([layer]) for layer in layers]
        self._judge([*alone, *(self._ranked(Shape(hidden_size=size)) for size in hidden_sizes)])
        self._alone = {layer: self.losses[plan] for layer, plan in zip(layers, alone, strict=True)}
        scores = [self._alone.get(layer, np.inf) for layer in range(self._total)]
        self.scores = replace(self.scores, layers=tuple(torch.tensor(each, dtype=torch.float64) for each in scores))

    @property
    def meaning(self) -> str:
        """What the losses are, for people."""
        return f"{self._metric} of {len(self._walk.batches)} batches, parts closed, nothing refitted"

    def predict(self, space: SearchSpace) -> np.ndarray:
        """The predicted loss over the space: (layers, heads, FFN sizes). Depth and hidden size are measured."""
        heads = np.stack([heads_cut(each, space.dense, space.heads) for each in self.scores.heads])
        ffn = np.stack([channels_cut(each, space.ffn) for each in self.scores.channels])
        sizes = [Shape(intermediate_size=size) for size in space.ffn]
        asked = {HEADS: _at_widths(space.heads, heads.sum(0)), FFN: _at_widths(sizes, ffn.sum(0))}
        asked = {axis: each for axis, each in asked.items() if axis not in self._curves}
        plans = [self._ranked(shape) for each in asked.values() for shape, _ in each]
        narrow = [] if space.hidden_size is None else [self._ranked(Shape(hidden_size=space.hidden_size))]
        candidates = {count: self._candidates(count) for count in space.layers if count not in self._depths}
        self._judge([*plans, *narrow, *(plan for each in candidates.values() for plan in each)])
        self._depths |= {count: min(each, key=self._loss) for count, each in candidates.items()}
        for axis, each in asked.items():
            self._curves[axis] = loss_curve({cut: self._loss(self._ranked(shape)) for shape, cut in each})
        hidden = sum(self._loss(plan) for plan in narrow)
        result = np.empty((len(space.layers), len(space.heads), len(space.ffn)))
        by_depth = {count: self._loss(self._depths[count]) for count in space.layers}
        for row, count in enumerate(space.layers):
            kept = list(self._depths[count].layers)
            gone = max(loss for other, loss in by_depth.items() if other >= count)  # fewer layers lose no less
            width = self._curves[HEADS](heads[kept].sum(0))[:, None] + self._curves[FFN](ffn[kept].sum(0))[None, :]
            result[row] = hidden + (0.0 if count == self._total else gone) + width
        return result

    def evaluate(self, shape: Shape) -> float:
        """The measured loss of a shape before any recovery."""
        plan = self.plan(shape)
        self._judge([plan])
        return 0.0 if plan.keeps_all else self.losses[plan]

    def plan(self, shape: Shape) -> Plan:
        """
        What stays at a shape.

        Raises:
            IllegalShapeError, InvalidPlanError: as `ActivityQuality.plan`.
        """
        whole = shape.complete(self.layout.dense)
        check_legal(self.layout, whole)
        count = whole.sizes()["num_hidden_layers"]
        if count not in self._depths:
            candidates = self._candidates(count)
            self._judge(candidates)
            self._depths[count] = min(candidates, key=self._loss)
        return self._ranked(whole, self._depths[count].layers)

    @property
    def _total(self) -> int:
        return self.layout.dense.sizes()["num_hidden_layers"]

    def _judge(self, plans: Iterable[Plan]) -> None:
        new = [plan for plan in dict.fromkeys(plans) if plan not in self.losses and not plan.keeps_all]
        if new:
            self._metric, losses = closed_losses(self._walk, self._stream, new, self._basis, self._progress)
            self.losses |= dict(zip(new, losses, strict=True))

    def _loss(self, plan: Plan) -> float:
        return max(LEAST, self.losses.get(plan, 0.0))

    def _ranked(self, shape: Shape, layers: Sequence[int] | None = None) -> Plan:
        """The plan of a shape; of these layers if they are given."""
        scores = self.scores
        if layers is not None:
            kept = [torch.tensor(float(layer in layers), dtype=torch.float64) for layer in range(self._total)]
            scores = replace(scores, layers=tuple(kept))
        return rank(self.layout, scores, shape.complete(self.layout.dense))

    def _without(self, gone: Sequence[int]) -> Plan:
        kept = [layer for layer in range(self._total) if layer not in gone]
        return self._ranked(Shape(num_hidden_layers=len(kept)), kept)

    def _droppable(self) -> list[int]:
        """Those that can go alone: what must stay does, and the only layer before a backbone's stage."""
        alone = {start for start, end in self.layout.stages if end - start == 1}
        return [layer for layer in range(self._total) if layer not in depth_of(self.layout).pinned.keys() | alone]

    def _candidates(self, count: int) -> list[Plan]:
        """Plans of so many layers that may lose least."""
        shape, gone = Shape(num_hidden_layers=count), self._total - count
        by_influence = rank(
            self.layout, replace(self.scores, layers=self._influence), shape.complete(self.layout.dense)
        )
        found = [self._ranked(shape), self._ranked(shape, by_influence.layers)]
        runs = [range(start, start + gone) for start in range(count + 1)]
        runs = [run for run in runs if all(layer in self._alone for layer in run)]
        if gone and runs and not self.layout.stages:
            runs = sorted(runs, key=lambda run: sum(self._alone[layer] for layer in run))
            found += [self._without(run) for run in runs[:RUNS]]
        return list(dict.fromkeys(found))


def _at_widths(shapes: Sequence[Shape], cut: np.ndarray) -> list[tuple[Shape, float]]:
    """Of the shapes that cut something those nearest to `WIDTHS` of the axis, each with what it cuts."""
    sizes = np.array([next(iter(shape.to_dict().values())) for shape in shapes], dtype=float)
    places = {int(np.argmin(np.abs(sizes - part * sizes.max()) + 1e-6 * cut / (cut.max() + 1e-30))) for part in WIDTHS}
    return [(shapes[place], float(cut[place])) for place in sorted(places) if cut[place] > 0]
