"""The quality of shapes of a model larger than memory, by what its parts do to the residual stream."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from ..basis.basis import Basis
from ..gates.reading import UnitScores
from ..planning.plan import Plan
from ..planning.ranking import rank
from ..refit.activity import Activity, activity_of
from ..search.scores import channels_cut, heads_cut
from ..search.space import SearchSpace
from ..vanilla.batches import Batch
from ..vanilla.family import Layout
from ..vanilla.legality import check_legal
from ..vanilla.shape import FFN, HEADS, LAYERS, Shape
from .walk import open_walk


@dataclass(frozen=True)
class ActivityQuality:
    """
    The quality of shapes by one walk through the dense model. Nothing is evaluated: predictions are all there is.

    What is cut costs half the square by which it changes the residual stream, in parts of the stream's own square
    behind the layer; summed up, as if errors were independent. For a layer that goes it is its influence, 1 minus the
    cosine of the stream before and after it, which for small changes is the same.

    Args:
        layout: of the dense model.
        activity: what its parts do on calibration batches.
        basis: of its residual stream, if plans may keep directions of it; the first ones stay. What that costs is not
            predicted.
    """

    layout: Layout
    activity: Activity
    basis: Basis | None = None

    @property
    def meaning(self) -> str:
        """What the losses are, for people."""
        return "1 minus the cosine of the residual stream, summed over what is cut; from activations alone"

    @cached_property
    def scores(self) -> UnitScores:
        """What cutting each unit costs."""
        layers = tuple(torch.tensor(each, dtype=torch.float64) for each in self.activity.influence)
        units = torch.arange(self.layout.hidden_size, 0, -1, dtype=torch.float64)
        return UnitScores(
            self._parts(self.activity.heads),
            self._parts(self.activity.channels),
            layers,
            hidden=None if self.basis is None else units,
            rotated=self.basis is not None,
        )

    def _parts(self, energies: Sequence[torch.Tensor]) -> tuple[torch.Tensor | None, ...]:
        """Energies in parts of twice the stream's; None where a layer's projection is not known."""
        pairs = zip(energies, self.activity.stream, strict=True)
        return tuple(each / (2 * stream) if len(each) else None for each, stream in pairs)

    @property
    def free(self) -> tuple[str, ...]:
        """What can be cut."""
        known = {HEADS: self.scores.heads, FFN: self.scores.channels, LAYERS: self.scores.layers}
        beside = self.layout.further  # modules in no layer count these units, too
        return tuple(
            axis for axis, each in known.items() if axis not in beside and all(score is not None for score in each)
        )

    def predict(self, space: SearchSpace) -> np.ndarray:
        """The predicted loss over the space: (layers, heads, FFN sizes)."""
        heads = np.stack([heads_cut(each, space.dense, space.heads) for each in self.scores.heads])
        ffn = np.stack([channels_cut(each, space.ffn) for each in self.scores.channels])
        result = np.empty((len(space.layers), len(space.heads), len(space.ffn)))
        for row, count in enumerate(space.layers):
            kept = list(self.plan(Shape(num_hidden_layers=count)).layers)
            gone = sum(each for layer, each in enumerate(self.activity.influence) if layer not in kept)
            result[row] = gone + heads[kept].sum(0)[:, None] + ffn[kept].sum(0)[None, :]
        return result

    def evaluate(self, shape: Shape) -> None:
        """Nothing: a slim model would have to be walked through for it."""

    def plan(self, shape: Shape) -> Plan:
        """
        What stays at a shape: the layers of most influence, the heads and channels of most energy.

        Args:
            shape: the sizes; what is left out stays.

        Raises:
            IllegalShapeError: if there is no vanilla model of it.
            InvalidPlanError: if it cuts what no layer's energy is known of.
        """
        whole = shape.complete(self.layout.dense)
        check_legal(self.layout, whole)
        return rank(self.layout, self.scores, whole)


def walk_checkpoint(
    base: str | os.PathLike[str],
    calibration: Iterable[Batch],
    *,
    basis: Basis | None = None,
    device: str | None = None,
    spill: str | os.PathLike[str] | None = None,
) -> ActivityQuality:
    """
    Walk once through a model that is larger than memory, layer by layer from its files.

    Args:
        base: folder or Hub id of the dense model, with safetensors files.
        calibration: batches, keyword arguments of its forward pass. Labels are not used, padding does not count.
        basis: of the residual stream (`checkpoint_basis`), for plans of narrower ones.
        device: where layers are computed; the CPU if left out.
        spill: a folder on a disk for hidden states, in files without a name; they stay in memory if left out, and on
            an accelerator in its own.

    Returns:
        `ActivityQuality`: `.plan(shape)` for sizes that are known; `plan_checkpoint` searches them.

    Raises:
        HawAdaError: if there are no batches.
        BadDataError: if a batch holds what the model cannot take.
        UnsupportedModelError: as `Checkpoint` and `start_stream`; if a layer's outputs are no linear maps.
    """
    with open_walk(base, calibration, device=device, spill=spill) as walk:
        return ActivityQuality(walk.layout, activity_of(walk.start(), walk.batches), basis)
